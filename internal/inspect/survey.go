package inspect

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	v1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
)

// patience is how long one question may take.
const patience = 5 * time.Second

// survey is what one inspection asks, each thing once, whoever wants it first.
type survey struct {
	env   Environment
	hub   *hubSurvey
	hosts []*hostSurvey
	// outside is where packets are to get, beyond the hub's uplink if there is such a place.
	outside func() (netip.Addr, error)
	heard   func() []netip.Addr // from whom it was reached; may be nil
}

type hubSurvey struct {
	Machine
	client v1.HubClient
	facts  func() (*v1.HubFacts, error)
	leases func() ([]*v1.Lease, error)
}

type hostSurvey struct {
	Machine
	client v1.HostClient
	vms    v1alpha1.MicroVMClient
	facts  func() (*v1.HostFacts, error)
	list   func() ([]*types.MicroVM, error)
}

func newSurvey(ctx context.Context, env Environment) *survey {
	hub := &hubSurvey{Machine: env.Hub, client: v1.NewHubClient(env.Hub.Conn)}
	hub.facts = once(ctx, func(ctx context.Context) (*v1.HubFacts, error) {
		return hub.client.Facts(ctx, &emptypb.Empty{})
	})
	hub.leases = once(ctx, func(ctx context.Context) ([]*v1.Lease, error) {
		r, err := hub.client.ListLeases(ctx, &v1.ListLeasesRequest{})
		return r.GetLeases(), err
	})
	s := &survey{env: env, hub: hub}
	s.outside = once(ctx, func(ctx context.Context) (netip.Addr, error) {
		if env.Outside == nil {
			return netip.Addr{}, nil
		}
		return env.Outside(ctx), nil
	})
	if env.Hear != nil {
		s.heard, _ = env.Hear(ctx) // without it a packet only shows that there is a way
	}
	for _, m := range env.Hosts {
		h := &hostSurvey{Machine: m, client: v1.NewHostClient(m.Conn), vms: v1alpha1.NewMicroVMClient(m.Conn)}
		h.facts = once(ctx, func(ctx context.Context) (*v1.HostFacts, error) {
			return h.client.Facts(ctx, &emptypb.Empty{})
		})
		h.list = once(ctx, func(ctx context.Context) ([]*types.MicroVM, error) {
			r, err := h.vms.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{})
			return r.GetMicrovm(), err
		})
		s.hosts = append(s.hosts, h)
	}
	return s
}

// once asks when first called, and gives all callers the same answer.
func once[T any](ctx context.Context, ask func(context.Context) (T, error)) func() (T, error) {
	return sync.OnceValues(func() (T, error) {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		return ask(ctx)
	})
}

// lease is the lease of a MAC address, nil if it has none.
func (h *hubSurvey) lease(mac string) (*v1.Lease, error) {
	leases, err := h.leases()
	if err != nil {
		return nil, err
	}
	for _, l := range leases {
		// One that is kept for the card may not be the one that it has.
		if sameMAC(l.GetMac(), mac) && l.GetState() == "active" {
			return l, nil
		}
	}
	return nil, nil
}

func sameMAC(a, b string) bool {
	x, err1 := net.ParseMAC(a)
	y, err2 := net.ParseMAC(b)
	return err1 == nil && err2 == nil && x.String() == y.String()
}

// connection is what gRPC puts around the error of a connection.
var connection = regexp.MustCompile(`^(?:latest balancer error: )?connection error: desc = "(?:transport: (?:Error while dialing|authentication handshake failed): )?(.*)"$`)

// said is what went wrong with a question, without gRPC's own words.
func said(err error) string {
	s := status.Convert(err)
	switch s.Code() {
	case codes.DeadlineExceeded:
		if strings.HasPrefix(s.Message(), context.DeadlineExceeded.Error()) { // our own
			return fmt.Sprintf("no answer within %s", patience)
		}
	case codes.Unimplemented:
		return "this version does not know the question"
	}
	return strings.Join(strings.Fields(connection.ReplaceAllString(s.Message(), "$1")), " ")
}

// unreachable is the finding about a machine whose service does not answer.
func unreachable(m Machine, service string, err error) finding {
	where := m.Endpoint
	if code := status.Code(err); code != codes.Unavailable && code != codes.DeadlineExceeded {
		return fail(fmt.Sprintf("%s at %s: %s", service, where, said(err)))
	}
	return fail(fmt.Sprintf("%s at %s does not answer: %s (its log: `ingot machine logs %s`)", service, where, said(err), m.Name))
}
