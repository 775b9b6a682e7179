package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/inspect"
)

// cloud is an environment as the commands reach it: over gRPC, and in no other
// way. It never looks at what lies on a machine's disk.
type cloud struct {
	name  string
	hub   *hubClient
	hosts []*hostClient

	inspection inspect.Environment
}

type hubClient struct {
	inspect.Machine
	ingotv1.HubClient
	conn *grpc.ClientConn
}

type hostClient struct {
	inspect.Machine
	ingotv1.HostClient
	v1alpha1.MicroVMClient
	conn *grpc.ClientConn
}

func (c *cloud) close() {
	c.hub.conn.Close()
	for _, h := range c.hosts {
		h.conn.Close()
	}
}

// host is the host of that name.
func (c *cloud) host(name string) (*hostClient, error) {
	for _, h := range c.hosts {
		if h.Name == name {
			return h, nil
		}
	}
	return nil, fmt.Errorf("find host %s: %w: environment %s has %s", name, errdefs.ErrNotFound, c.name, strings.Join(names(c.hosts), ", "))
}

func names(hosts []*hostClient) []string {
	var all []string
	for _, h := range hosts {
		all = append(all, h.Name)
	}
	return all
}

// microVM is a microVM and the host that it is on.
type microVM struct {
	*types.MicroVM
	host *hostClient
}

func (m microVM) uid() string { return m.GetSpec().GetUid() }

// String is the name as a person would type it.
func (m microVM) String() string {
	if ns := m.GetSpec().GetNamespace(); ns != defaultNamespace {
		return ns + "/" + m.GetSpec().GetId()
	}
	return m.GetSpec().GetId()
}

const defaultNamespace = "default"

// on runs f for each host at the same time. The error joins those of all hosts,
// each with its host's name.
func (c *cloud) on(hosts []*hostClient, f func(h *hostClient) error) error {
	errs := make([]error, len(hosts))
	var wg sync.WaitGroup
	for i, h := range hosts {
		wg.Go(func() {
			if err := f(h); err != nil {
				errs[i] = fmt.Errorf("%s: %w", h.Name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// list is the microVMs of a namespace, all if it is empty, in order of their
// names. What some hosts answered is there also when others did not.
func (c *cloud) list(ctx context.Context, namespace string) ([]microVM, error) {
	var mu sync.Mutex
	var all []microVM
	err := c.on(c.hosts, func(h *hostClient) error {
		r, err := h.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{Namespace: namespace})
		if err != nil {
			return fmt.Errorf("list microVMs: %w", err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, vm := range r.GetMicrovm() {
			all = append(all, microVM{vm, h})
		}
		return nil
	})
	slices.SortFunc(all, func(a, b microVM) int {
		return cmp.Or(cmp.Compare(a.GetSpec().GetNamespace(), b.GetSpec().GetNamespace()),
			cmp.Compare(a.GetSpec().GetId(), b.GetSpec().GetId()), cmp.Compare(a.uid(), b.uid()))
	})
	return all, err
}

// find is the microVM that a person calls name: NAME (in the default namespace,
// or in the only one that has it), NAMESPACE/NAME, or a uid or the beginning of one.
func (c *cloud) find(ctx context.Context, name string) (microVM, error) {
	found, err := c.findAll(ctx, []string{name})
	if err != nil {
		return microVM{}, err
	}
	return found[0], nil
}

// findAll is find for several names, with one question to each host.
func (c *cloud) findAll(ctx context.Context, wanted []string) ([]microVM, error) {
	var all []microVM
	var silent error
	for deadline := time.Now().Add(findPatience); ; { // a daemon that was killed is started again
		all, silent = c.list(ctx, "")
		missing := func(name string) bool { _, err := pick(all, name); return errdefs.IsNotFound(err) }
		if silent == nil || !slices.ContainsFunc(wanted, missing) || !time.Now().Before(deadline) || ctx.Err() != nil {
			break
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	var found []microVM
	var errs []error
	for _, name := range wanted {
		vm, err := pick(all, name)
		if err != nil && errdefs.IsNotFound(err) && silent != nil {
			err = fmt.Errorf("%w, and not every host answered: %w", err, silent)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !slices.ContainsFunc(found, func(f microVM) bool { return f.uid() == vm.uid() }) {
			found = append(found, vm)
		}
	}
	return found, errors.Join(errs...)
}

// findPatience is how long a microVM is looked for on hosts that do not answer.
const findPatience = 3 * time.Second

// shortestPrefix is how much of a uid must be given.
const shortestPrefix = 4

func pick(all []microVM, name string) (microVM, error) {
	matches := func(is func(microVM) bool) []microVM {
		return slices.DeleteFunc(slices.Clone(all), func(vm microVM) bool { return !is(vm) })
	}
	namespace, id, qualified := strings.Cut(name, "/")
	if !qualified {
		namespace, id = defaultNamespace, name
	}
	for _, found := range [][]microVM{
		matches(func(vm microVM) bool { return vm.uid() == strings.ToUpper(name) }),
		matches(func(vm microVM) bool { return vm.GetSpec().GetNamespace() == namespace && vm.GetSpec().GetId() == id }),
		matches(func(vm microVM) bool { return !qualified && vm.GetSpec().GetId() == id }),
		matches(func(vm microVM) bool {
			return len(name) >= shortestPrefix && strings.HasPrefix(vm.uid(), strings.ToUpper(name))
		}),
	} {
		switch len(found) {
		case 0:
			continue
		case 1:
			return found[0], nil
		}
		var which []string
		for _, vm := range found {
			which = append(which, fmt.Sprintf("%s/%s %s on %s", vm.GetSpec().GetNamespace(), vm.GetSpec().GetId(), vm.uid(), vm.host.Name))
		}
		return microVM{}, fmt.Errorf("find microVM %s: %w: it could be %s", name, errdefs.ErrInvalidArgument, strings.Join(which, ", or "))
	}
	return microVM{}, fmt.Errorf("find microVM %s: %w; `ingot ps` shows what there is", name, errdefs.ErrNotFound)
}

// leases is the hub's leases by MAC address, none where the hub does not answer:
// then a microVM is shown without an address.
func (c *cloud) leases(ctx context.Context) map[string]*ingotv1.Lease {
	r, err := c.hub.ListLeases(ctx, &ingotv1.ListLeasesRequest{})
	if err != nil {
		fmt.Fprintln(os.Stderr, "ingot: list leases:", explain(err, c.name))
		return nil
	}
	return activeByMAC(r.GetLeases())
}

// activeByMAC are the leases that cards have. An address that is kept for a card may not
// be the one that it has.
func activeByMAC(all []*ingotv1.Lease) map[string]*ingotv1.Lease {
	byMAC := map[string]*ingotv1.Lease{}
	for _, l := range all {
		if mac, err := net.ParseMAC(l.GetMac()); err == nil && l.GetState() == "active" {
			byMAC[mac.String()] = l
		}
	}
	return byMAC
}

// gone says whether err is a host's word that the microVM does not exist.
func gone(err error) bool {
	return status.Code(err) == codes.NotFound || errdefs.IsNotFound(err)
}
