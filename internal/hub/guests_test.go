package hub

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
	"ingot/internal/vm"
)

// told is a host of which there is no more than what it tells, as docs/api.md has it.
type told struct {
	ingotv1.UnimplementedHostServer
	socket string
	server *grpc.Server

	mu     sync.Mutex // guards all below
	vms    map[string]*types.MicroVM
	events []*ingotv1.WatchResponse // their cursors are their numbers, from 1
	lost   int                      // so many of them are not kept any more
	more   chan struct{}            // closed with the next event
	asked  []string                 // the cursors of watches
}

func newTold(t *testing.T) *told {
	w := &told{socket: filepath.Join(t.TempDir(), "s"), vms: map[string]*types.MicroVM{}, more: make(chan struct{})}
	w.start(t)
	return w
}

func (w *told) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	w.server = s
	ingotv1.RegisterHostServer(s, w)
	go s.Serve(l)
	t.Cleanup(s.Stop)
}

func (w *told) Watch(r *ingotv1.WatchRequest, stream ingotv1.Host_WatchServer) error {
	w.mu.Lock()
	w.asked = append(w.asked, r.GetResume())
	seq := len(w.events)
	var first []*ingotv1.WatchResponse
	if r.GetResume() == "" {
		for _, v := range w.vms {
			first = append(first, &ingotv1.WatchResponse{Microvm: v, Cursor: strconv.Itoa(seq)})
		}
		first = append(first, &ingotv1.WatchResponse{Kind: ingotv1.WatchResponse_SYNCED, Cursor: strconv.Itoa(seq)})
	} else {
		seq, _ = strconv.Atoi(r.GetResume())
	}
	lost := w.lost
	w.mu.Unlock()
	if seq < lost {
		return status.Error(codes.OutOfRange, "not kept")
	}
	for {
		for _, r := range first {
			if err := stream.Send(r); err != nil {
				return err
			}
		}
		w.mu.Lock()
		first, seq = slices.Clone(w.events[seq:]), len(w.events)
		more := w.more
		w.mu.Unlock()
		if len(first) > 0 {
			continue
		}
		select {
		case <-more:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// tell has something happen to a microVM.
func (w *told) tell(kind ingotv1.WatchResponse_Kind, v *types.MicroVM) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.vms[v.Spec.GetUid()] = v
	if kind == ingotv1.WatchResponse_DELETED {
		delete(w.vms, v.Spec.GetUid())
		v = &types.MicroVM{Spec: &types.MicroVMSpec{Uid: v.Spec.Uid, Id: v.Spec.Id, Namespace: v.Spec.Namespace}}
	}
	w.events = append(w.events, &ingotv1.WatchResponse{Kind: kind, Microvm: v, Cursor: strconv.Itoa(len(w.events) + 1)})
	close(w.more)
	w.more = make(chan struct{})
}

// microVM is one whose uid and MAC address end with a number.
func microVM(number int, namespace, name string) *types.MicroVM {
	return &types.MicroVM{Spec: &types.MicroVMSpec{
		Uid: new(fmt.Sprintf("01K%023d", number)), Id: name, Namespace: namespace,
		Interfaces: []*types.NetworkInterface{
			{DeviceId: "eth0", GuestMac: new(vm.MetadataMAC), Address: &types.StaticAddress{Address: "169.254.0.1/16"}},
			{DeviceId: "eth1", GuestMac: new(fmt.Sprintf("02:00:00:00:AA:%02X", number))},
		},
	}}
}

func mac(number int) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0xaa, byte(number)} }

// hears starts to hear hosts, until the test ends or end is called.
func hears(t *testing.T, file string, hosts map[string]*told) (g *guests, end func()) {
	t.Helper()
	machines := []Machine{{Name: "network-hub"}}
	for name := range hosts {
		machines = append(machines, Machine{Name: name, Host: true})
	}
	g = newGuests(machines, file, func(m Machine) (*grpc.ClientConn, error) {
		return grpc.NewClient("unix:"+hosts[m.Name].socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	began, ended := make(chan bool), make(chan error, 1)
	go func() { ended <- g.run(ctx, func() { close(began) }) }()
	<-began
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(end)
	return g, end
}

// until waits for changes until something is so.
func (g *guests) until(t *testing.T, what string, so func() bool) {
	t.Helper()
	late := time.After(10 * time.Second)
	for {
		changed := g.changes()
		if so() {
			return
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond): // facts are no changes
		case <-late:
			t.Fatalf("wait for %s: %v", what, g.all())
		}
	}
}

func (g *guests) names() string {
	var names []string
	for _, one := range g.all() {
		names = append(names, one.String()+"@"+one.Host)
	}
	return fmt.Sprint(names)
}

func TestGuests(t *testing.T) {
	zero, one := newTold(t), newTold(t)
	zero.tell(ingotv1.WatchResponse_CREATED, microVM(1, "default", "web"))
	static := microVM(2, "team", "Data.Base")
	static.Spec.Interfaces[1].Address = &types.StaticAddress{Address: "192.168.10.5/25"}
	one.tell(ingotv1.WatchResponse_CREATED, static)
	file := filepath.Join(t.TempDir(), "ingot", "guests.json")
	hosts := map[string]*told{"host-0": zero, "host-1": one}
	g, end := hears(t, file, hosts)
	g.until(t, "both", func() bool { return g.names() == "[default/web@host-0 team/Data.Base@host-1]" })
	if found := g.withMAC(mac(1)); found == nil || found != g.find("default", "web") || len(found.Cards) != 1 {
		t.Errorf("by MAC: %v", found)
	}
	if none, err := net.ParseMAC(vm.MetadataMAC); err != nil || g.withMAC(none) != nil {
		t.Errorf("by the metadata interface's MAC: %v, %v", g.withMAC(none), err)
	}
	if found := g.withAddress(netip.MustParseAddr("192.168.10.5")); found == nil || found != g.named("data.base.team") {
		t.Errorf("by address: %v", found)
	}
	if found := g.named("data.base"); found == nil || g.named("base.team") != nil || !g.above("base.team") || !g.above("team") || g.above("data") {
		t.Errorf("by parts of a name: %v", found)
	}

	// What does not concern the hub is no change.
	before := g.changes()
	zero.tell(ingotv1.WatchResponse_CHANGED, microVM(1, "default", "web"))
	zero.tell(ingotv1.WatchResponse_CREATED, microVM(3, "default", "late"))
	g.until(t, "a third", func() bool { return g.find("default", "late") != nil })
	select {
	case <-before:
	default:
		t.Error("a third one is no change")
	}
	zero.tell(ingotv1.WatchResponse_DELETED, microVM(3, "default", "late"))
	g.until(t, "two again", func() bool { return g.find("default", "late") == nil && g.withMAC(mac(3)) == nil })

	// Of a host that is gone it is known what it had; when it is back, what happened meanwhile.
	zero.server.Stop()
	os.Remove(zero.socket)
	g.until(t, "silence", func() bool { return !g.facts()[0].Heard && g.facts()[1].Heard })
	if f := g.facts()[0]; f.Problem == nil || f.Guests != 1 || f.Host != "host-0" || time.Since(f.Since) > 10*time.Second || g.named("web") == nil {
		t.Errorf("a silent host: %+v", f)
	}
	zero.tell(ingotv1.WatchResponse_CREATED, microVM(4, "default", "meanwhile"))
	zero.start(t)
	g.until(t, "the host", func() bool { return g.facts()[0].Heard && g.find("default", "meanwhile") != nil })
	if last := zero.asked[len(zero.asked)-1]; last != "4" {
		t.Errorf("it was asked for what is after %q", last)
	}

	// Where its journal is gone, it is asked for everything.
	zero.server.Stop()
	os.Remove(zero.socket)
	zero.tell(ingotv1.WatchResponse_DELETED, microVM(4, "default", "meanwhile"))
	zero.lost = len(zero.events)
	zero.start(t)
	g.until(t, "what is left", func() bool { return g.find("default", "meanwhile") == nil })
	if last := zero.asked[len(zero.asked)-1]; last != "" || g.find("default", "web") == nil {
		t.Errorf("it was asked for what is after %q", last)
	}

	// The next hub knows what this one knew, whether hosts answer or not.
	end()
	zero.server.Stop()
	one.server.Stop()
	for _, w := range hosts {
		os.Remove(w.socket)
	}
	next, end := hears(t, file, hosts)
	if next.names() != "[default/web@host-0 team/Data.Base@host-1]" || next.withAddress(netip.MustParseAddr("192.168.10.5")) == nil {
		t.Errorf("the next hub knows %s", next.names())
	}
	end()
	// But not of a machine that is no host any more, nor from a file that is none.
	last, end := hears(t, file, map[string]*told{"host-1": one})
	if last.names() != "[team/Data.Base@host-1]" {
		t.Errorf("with one host: %s", last.names())
	}
	end()
	const web = `{"uid": "1", "namespace": "default", "name": "web", "host": "host-0"}`
	for text, want := range map[string]string{
		`[{`:                                     "[]",
		`null`:                                   "[]",
		`[null]`:                                 "[]", // ended the hub
		`[` + web + `]`:                          "[]", // of a version that knew no formats
		`{"format": 2, "guests": [` + web + `]}`: "[]",
		`{"format": 1, "guests": [null, ` + web + `]}`: "[default/web@host-0]",
		`{"format": 1, "guests": null}`:                "[]",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		last, end := hears(t, file, hosts)
		if last.names() != want {
			t.Errorf("from %s: %s", text, last.names())
		}
		end()
	}
}

// TestSameNames: what two have is the older one's.
func TestSameNames(t *testing.T) {
	zero, one := newTold(t), newTold(t)
	zero.tell(ingotv1.WatchResponse_CREATED, microVM(2, "default", "Web"))
	zero.tell(ingotv1.WatchResponse_CREATED, microVM(3, "a", "db"))
	zero.tell(ingotv1.WatchResponse_CREATED, microVM(9, "default", "bad..name"))
	thief := microVM(5, "b", "db")
	thief.Spec.Interfaces[1].GuestMac = new(mac(3).String())
	one.tell(ingotv1.WatchResponse_CREATED, thief)
	one.tell(ingotv1.WatchResponse_CREATED, microVM(1, "default", "web"))
	one.tell(ingotv1.WatchResponse_CREATED, microVM(4, "c", "web"))
	g, _ := hears(t, filepath.Join(t.TempDir(), "guests.json"), map[string]*told{"host-0": zero, "host-1": one})
	g.until(t, "all", func() bool { return len(g.all()) == 6 })
	for name, want := range map[string]string{"web": "default/web", "web.default": "default/web", "web.c": "c/web", "db": "a/db", "db.b": "b/db"} {
		if found := g.named(name); found == nil || found.String() != want {
			t.Errorf("%s is %v", name, found)
		}
	}
	if found := g.withMAC(mac(3)); found.String() != "a/db" {
		t.Errorf("the MAC address is %s's", found)
	}
	if g.named("bad..name") != nil || g.find("default", "bad..name") == nil {
		t.Error("bad..name is a name for DNS, or none at all")
	}
	// And the other's, once that is gone; in the default namespace before others.
	one.tell(ingotv1.WatchResponse_DELETED, microVM(1, "default", "web"))
	zero.tell(ingotv1.WatchResponse_DELETED, microVM(3, "a", "db"))
	g.until(t, "two less", func() bool { return len(g.all()) == 4 })
	if web, db := g.named("web"), g.named("db"); web.String() != "default/Web" || db.String() != "b/db" || g.withMAC(mac(3)) != db {
		t.Errorf("afterwards there are %s and %s", web, db)
	}
}
