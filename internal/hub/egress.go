package hub

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/nat"
)

func (s *service) SetEgress(ctx context.Context, r *ingotv1.SetEgressRequest) (*emptypb.Empty, error) {
	e, err := nat.ParseEgress(r.GetRules())
	if err != nil {
		return nil, fmt.Errorf("rules: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &emptypb.Empty{}, s.access.restrict(ctx, r.GetUid(), e)
}

func (s *service) ListEgress(context.Context, *ingotv1.ListEgressRequest) (*ingotv1.ListEgressResponse, error) {
	var m ingotv1.ListEgressResponse
	for _, one := range s.access.list() {
		if len(one.Egress) == 0 {
			continue
		}
		shown := &ingotv1.Egress{Uid: one.Guest.UID, Namespace: one.Guest.Namespace, Name: one.Guest.Name, Rules: one.Egress.Texts()}
		if one.Address.IsValid() {
			shown.GuestAddress = one.Address.String()
		}
		m.Egress = append(m.Egress, shown)
	}
	return &m, nil
}
