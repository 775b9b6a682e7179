package main

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/inspect"
)

// recordHost keeps the names of microVMs, and nothing else of them.
type recordHost struct {
	ingotv1.HostClient
	v1alpha1.MicroVMClient
	mu  sync.Mutex
	vms map[string]*types.MicroVM
}

func newRecordHost(uids ...string) *recordHost {
	h := &recordHost{vms: map[string]*types.MicroVM{}}
	for _, uid := range uids {
		h.vms[uid] = &types.MicroVM{Spec: &types.MicroVMSpec{Id: "twice", Namespace: "default", Uid: &uid}}
	}
	return h
}

func (h *recordHost) ListMicroVMs(context.Context, *v1alpha1.ListMicroVMsRequest, ...grpc.CallOption) (*v1alpha1.ListMicroVMsResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var r v1alpha1.ListMicroVMsResponse
	for _, vm := range h.vms {
		r.Microvm = append(r.Microvm, vm)
	}
	return &r, nil
}

func (h *recordHost) DeleteMicroVM(_ context.Context, r *v1alpha1.DeleteMicroVMRequest, _ ...grpc.CallOption) (*emptypb.Empty, error) {
	h.remove(r.Uid)
	return &emptypb.Empty{}, nil
}

func (h *recordHost) Watch(context.Context, *ingotv1.WatchRequest, ...grpc.CallOption) (ingotv1.Host_WatchClient, error) {
	return goneStream{}, nil
}

func (h *recordHost) remove(uid string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.vms, uid)
}

func (h *recordHost) has(uid string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.vms[uid] != nil
}

// goneStream is the watch of what is gone.
type goneStream struct{ ingotv1.Host_WatchClient }

func (goneStream) Recv() (*ingotv1.WatchResponse, error) {
	return nil, status.Error(codes.NotFound, "not found")
}

// Of two of one name one stays: the first, unless the other has not seen it.
func TestYield(t *testing.T) {
	for name, c := range map[string]struct {
		mine, other string
		goes        bool // the other one, after a while
		stays       bool // mine
	}{
		"the first, and the other gives way":          {mine: "1", other: "2", goes: true, stays: true},
		"the first, and the other has not looked yet": {mine: "1", other: "2"},
		"the second": {mine: "2", other: "1"},
	} {
		t.Run(name, func(t *testing.T) {
			here, there := newRecordHost(c.mine), newRecordHost(c.other)
			cloud := &cloud{}
			for _, h := range []*recordHost{here, there} {
				cloud.hosts = append(cloud.hosts, &hostClient{Machine: inspect.Machine{Name: "host"}, HostClient: h, MicroVMClient: h})
			}
			if c.goes {
				time.AfterFunc(2*pause, func() { there.remove(c.other) })
			}
			err := cloud.yield(t.Context(), microVM{here.vms[c.mine], cloud.hosts[0]})
			if stays := here.has(c.mine); stays != c.stays || stays == errdefs.IsAlreadyExists(err) {
				t.Errorf("it stays: %v, %v", stays, err)
			}
		})
	}
}
