package rpc

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/host"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// patience is how long a guest may take to shut down, if the client does not say.
const patience = 30 * time.Second

func patienceOf(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return patience, nil
	}
	if d.AsDuration() < 0 {
		return 0, &vm.FieldError{Field: "timeout", Problem: "is negative"}
	}
	return d.AsDuration(), nil
}

func (s *hostService) Start(_ context.Context, r *ingotv1.StartRequest) (*ingotv1.StartResponse, error) {
	v, err := s.Host.Start(r.GetUid())
	if err != nil {
		return nil, err
	}
	return &ingotv1.StartResponse{Microvm: message(v)}, nil
}

func (s *hostService) Stop(ctx context.Context, r *ingotv1.StopRequest) (*ingotv1.StopResponse, error) {
	timeout, err := patienceOf(r.Timeout)
	if err != nil {
		return nil, err
	}
	v, err := s.Host.Stop(ctx, r.GetUid(), timeout)
	if err != nil {
		return nil, err
	}
	return &ingotv1.StopResponse{Microvm: message(v)}, nil
}

func (s *hostService) Restart(ctx context.Context, r *ingotv1.RestartRequest) (*ingotv1.RestartResponse, error) {
	timeout, err := patienceOf(r.Timeout)
	if err != nil {
		return nil, err
	}
	v, err := s.Host.Restart(ctx, r.GetUid(), timeout)
	if err != nil {
		return nil, err
	}
	return &ingotv1.RestartResponse{Microvm: message(v)}, nil
}

func (s *hostService) Pause(ctx context.Context, r *ingotv1.PauseRequest) (*ingotv1.PauseResponse, error) {
	v, err := s.Host.Pause(ctx, r.GetUid())
	if err != nil {
		return nil, err
	}
	return &ingotv1.PauseResponse{Microvm: message(v)}, nil
}

func (s *hostService) Resume(ctx context.Context, r *ingotv1.ResumeRequest) (*ingotv1.ResumeResponse, error) {
	v, err := s.Host.Resume(ctx, r.GetUid())
	if err != nil {
		return nil, err
	}
	return &ingotv1.ResumeResponse{Microvm: message(v)}, nil
}

func (s *hostService) Update(_ context.Context, r *ingotv1.UpdateRequest) (*ingotv1.UpdateResponse, error) {
	decoded := map[string]string{}
	for key, value := range r.GetMetadata() {
		text, err := base64.StdEncoding.DecodeString(value)
		if err != nil {
			return nil, &vm.FieldError{Field: "metadata[" + key + "]", Problem: "is not base64"}
		}
		decoded[key] = string(text)
	}
	allow, err := wire.Addresses("allow_addresses", r.GetAllowAddresses())
	disallow, wrong := wire.Addresses("disallow_addresses", r.GetDisallowAddresses())
	if err := errors.Join(err, wrong); err != nil {
		return nil, err
	}
	v, err := s.Host.Update(r.GetUid(), func(m *vm.Mutable) {
		maps.Copy(m.Labels, r.GetLabels())
		for _, key := range r.GetRemoveLabels() {
			delete(m.Labels, key)
		}
		maps.Copy(m.Metadata, decoded)
		for _, key := range r.GetRemoveMetadata() {
			delete(m.Metadata, key)
		}
		m.AllowedAddresses = slices.DeleteFunc(m.AllowedAddresses, func(p netip.Prefix) bool { return slices.Contains(disallow, p) })
		for _, p := range allow {
			if !slices.Contains(m.AllowedAddresses, p) {
				m.AllowedAddresses = append(m.AllowedAddresses, p)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	return &ingotv1.UpdateResponse{Microvm: message(v)}, nil
}

// mostListed is how many microVMs are in a page at most.
const mostListed = 1000

func (s *hostService) List(_ context.Context, r *ingotv1.ListRequest) (*ingotv1.ListResponse, error) {
	selector, err := vm.ParseSelector(r.GetSelector())
	if err != nil {
		return nil, err
	}
	size := int(r.GetPageSize())
	if size < 0 {
		return nil, &vm.FieldError{Field: "page_size", Problem: "is negative"}
	}
	if size == 0 || size > mostListed {
		size = mostListed
	}
	var answer ingotv1.ListResponse
	last := r.GetPageToken()
	for _, v := range s.Host.List(r.GetNamespace(), r.GetName()) { // by uid, which is by age
		if v.Spec.UID <= r.GetPageToken() || !selector.Matches(v.Spec.Labels) {
			continue
		}
		if len(answer.Microvms) == size {
			answer.NextPageToken = last
			break
		}
		answer.Microvms = append(answer.Microvms, message(v))
		last = v.Spec.UID
	}
	return &answer, nil
}

func (s *hostService) Watch(r *ingotv1.WatchRequest, stream ingotv1.Host_WatchServer) error {
	selector, err := vm.ParseSelector(r.GetSelector())
	if err != nil {
		return err
	}
	asked := func(s vm.Spec) bool {
		return (r.GetUid() == "" || s.UID == r.GetUid()) && (r.GetNamespace() == "" || s.Namespace == r.GetNamespace())
	}
	cursor, end := r.GetResume(), ""
	if _, err := s.Host.Get(r.GetUid()); err != nil && r.GetUid() != "" && cursor != "" {
		// It is gone, and an earlier watch may have told so.
		if end = s.Host.Now(); cursor == end {
			return fmt.Errorf("watch: %w", err)
		}
	}
	if cursor == "" {
		cursor = s.Host.Now()
		wanted := func(v host.View) bool { return asked(v.Spec) && selector.Matches(v.Spec.Labels) }
		if err := s.current(r.GetUid(), cursor, wanted, stream); err != nil {
			return err
		}
	}
	err = s.Host.Events(stream.Context(), cursor, func(e host.Event) error {
		kind, there := kinds[e.Kind], selector.Matches(e.View.Spec.Labels)
		if !there && e.Was != nil && selector.Matches(e.Was) {
			kind, there = ingotv1.WatchResponse_DELETED, true // from what is watched
		}
		if there && asked(e.View.Spec) {
			if err := stream.Send(&ingotv1.WatchResponse{Microvm: message(e.View), Kind: kind, Cursor: e.Cursor}); err != nil {
				return err
			}
		}
		if e.Cursor == end || e.Kind == host.Deleted && e.View.Spec.UID == r.GetUid() {
			return fmt.Errorf("watch: microvm spec %s not found: %w", r.GetUid(), errdefs.ErrNotFound)
		}
		return nil
	})
	if errors.Is(err, context.Canceled) && stream.Context().Err() != nil {
		return context.Cause(stream.Context())
	}
	return err
}

var kinds = map[host.EventKind]ingotv1.WatchResponse_Kind{
	host.Created: ingotv1.WatchResponse_CREATED, host.Changed: ingotv1.WatchResponse_CHANGED, host.Deleted: ingotv1.WatchResponse_DELETED,
}

// current sends what is so at the beginning of a watch.
func (s *hostService) current(uid, cursor string, wanted func(host.View) bool, stream ingotv1.Host_WatchServer) error {
	if uid != "" {
		v, err := s.Host.Get(uid)
		if err != nil {
			return fmt.Errorf("watch: %w", err)
		}
		return stream.Send(&ingotv1.WatchResponse{Microvm: message(v), Cursor: cursor})
	}
	for _, v := range s.Host.List("", "") {
		if !wanted(v) {
			continue
		}
		if err := stream.Send(&ingotv1.WatchResponse{Microvm: message(v), Cursor: cursor}); err != nil {
			return err
		}
	}
	return stream.Send(&ingotv1.WatchResponse{Kind: ingotv1.WatchResponse_SYNCED, Cursor: cursor})
}
