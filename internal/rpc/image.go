package rpc

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/image"
)

func (s *hostService) ListImages(ctx context.Context, _ *ingotv1.ListImagesRequest) (*ingotv1.ListImagesResponse, error) {
	list, err := s.Images.Images(ctx, s.Host.Specs())
	if err != nil {
		return nil, err
	}
	return &ingotv1.ListImagesResponse{Images: held(list)}, nil
}

func (s *hostService) RemoveImages(ctx context.Context, r *ingotv1.RemoveImagesRequest) (*ingotv1.RemoveImagesResponse, error) {
	before, err := s.Images.ContentBytes(ctx)
	if err != nil {
		return nil, err
	}
	var gone []image.Held
	if len(r.GetImages()) > 0 {
		gone, err = s.Images.Remove(ctx, s.Host.Specs(), r.GetImages()...)
	} else {
		gone, err = s.Images.Prune(ctx, s.Host.Specs(), time.Now().Add(-r.GetUnusedFor().AsDuration()))
	}
	if err != nil {
		return nil, err
	}
	after, err := s.Images.ContentBytes(ctx)
	if err != nil {
		return nil, err
	}
	return &ingotv1.RemoveImagesResponse{Images: held(gone), FreedBytes: max(0, before-after)}, nil
}

func held(list []image.Held) []*ingotv1.HeldImage {
	var out []*ingotv1.HeldImage
	for _, h := range list {
		out = append(out, &ingotv1.HeldImage{
			Name: h.Name, Digest: h.Digest, SizeBytes: h.Size, MicrovmUids: h.VMs, UsedAt: timestamppb.New(h.Used),
		})
	}
	return out
}
