package hub

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
	"ingot/internal/need"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// neighbourhood is a hub's segment with a guest on it, and a host that tells of microVMs
// as hosts do: by TLS, and to those who have the token.
type neighbourhood struct {
	dir    string
	config string
	host   *told
	creds  pki.Files // the host's
	hub    ingotv1.HubClient
}

func newNeighbourhood(t *testing.T) *neighbourhood {
	t.Helper()
	for _, name := range []string{"dig", "getent"} {
		need.Binary(t, name)
	}
	segment(t)
	sh(t, `set -e; ip addr add 192.168.10.3/32 dev lo
		mkdir -p /etc/netns/guest; printf 'search lab.internal\nnameserver 192.168.10.2\n' >/etc/netns/guest/resolv.conf; touch /etc/resolv.conf`)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "addr", "del", "192.168.10.3/32", "dev", "lo").CombinedOutput(); err != nil {
			t.Errorf("clean up: %v\n%s", err, out)
		}
	})
	n := &neighbourhood{host: newTold(t)}
	n.host.server.Stop()
	n.dir, n.config = configured(t, `machines: [{name: network-hub, address: 192.168.10.2}, {name: Host-0, address: 192.168.10.3, host: true}]
reservations: [{microvm: default/kept, address: 192.168.10.80}]
`, map[string]string{"host-0": "192.168.10.3"})
	n.creds = pki.In(filepath.Join(n.dir, "host-0"))
	n.hub = operator(t, n.dir)
	return n
}

// serve has the host serve.
func (n *neighbourhood) serve(t *testing.T) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	shown, err := n.creds.Open(log)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "192.168.10.3:9090")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(append(wire.ServerOptions("secret", log), grpc.Creds(wire.TLS(shown.Config(), log)))...)
	ingotv1.RegisterHostServer(s, n.host)
	n.host.server = s
	go s.Serve(l)
	t.Cleanup(s.Stop)
}

// heard waits until the hub hears the host, or does not.
func (n *neighbourhood) heard(t *testing.T, want bool) *ingotv1.HubFacts {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		f, err := n.hub.Facts(ctx, &emptypb.Empty{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		if h := f.GetHosts(); len(h) == 1 && h[0].GetName() == "Host-0" && h[0].GetHeard() == want {
			return f
		}
	}
}

// says compares what a guest hears, which may be so a moment later.
func (n *neighbourhood) says(t *testing.T, command, want string) {
	t.Helper()
	var got string
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		out, _ := exec.Command("sh", "-c", "ip netns exec guest "+command).CombinedOutput()
		if got = strings.Join(strings.Fields(string(out)), " "); got == want {
			return
		}
	}
	t.Errorf("%s: %q, want %q", command, got, want)
}

// TestNames is what guests' resolvers hear of machines and microVMs that come and go.
func TestNames(t *testing.T) {
	n := newNeighbourhood(t)
	const dig, short = "dig +tries=1 +time=5 @192.168.10.2 ", "dig +tries=1 +time=5 +short @192.168.10.2 "
	code := func(name string) string {
		return dig + name + " | sed -n 's/.*status: \\([A-Z]*\\),.*/\\1/p; s/.*IN\tSOA.*/SOA/p'"
	}
	n.host.tell(ingotv1.WatchResponse_CREATED, microVM(1, "team", "web"))
	n.host.tell(ingotv1.WatchResponse_CREATED, microVM(2, "default", "db"))
	static := microVM(3, "default", "fixed")
	static.Spec.Interfaces[1].Address = &types.StaticAddress{Address: "192.168.10.9/25"}
	n.host.tell(ingotv1.WatchResponse_CREATED, static)
	n.serve(t)
	kill := start(t, n.config)
	n.heard(t, true)
	lease := func(name string) {
		t.Helper()
		set := write(t, n.dir+"/set", "#!/bin/sh\n[ -z $ip ] || ip addr replace $ip/25 dev eth0\n")
		sh(t, "ip netns exec guest busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -s "+set+" -x hostname:"+name+" 2>&1")
	}
	lease("db") // as another microVM is called
	all := func() {
		t.Helper()
		for name, ip := range map[string]string{
			"web.team.lab.internal": "192.168.10.26", "WEB.lab.internal": "192.168.10.26", "web": "192.168.10.26", "fixed.default.lab.internal": "192.168.10.9",
			"network-hub.lab.internal": "192.168.10.2", "host-0": "192.168.10.3", "db": "", "db.lab.internal": "", "db.default.lab.internal": "", "team.lab.internal": "",
			"-t AAAA web.team.lab.internal": "",
			"-x 192.168.10.26":              "web.team.lab.internal.", "-x 192.168.10.9": "fixed.default.lab.internal.", "-x 192.168.10.3": "host-0.lab.internal.",
		} {
			n.says(t, short+name, ip)
			n.says(t, short+"+tcp "+name, ip)
		}
		n.says(t, code("db.default.lab.internal"), "NOERROR SOA")
		n.says(t, code("nobody.team.lab.internal"), "NXDOMAIN SOA")
		n.says(t, code("-x 192.168.10.40"), "NXDOMAIN SOA")
		n.says(t, "getent hosts web.team", "192.168.10.26 web.team.lab.internal")
		n.says(t, "getent hosts web", "192.168.10.26 web.lab.internal")
		n.says(t, "getent hosts 192.168.10.26", "192.168.10.26 web.team.lab.internal")
		n.says(t, "getent hosts db; echo $?", "2")
	}
	all()
	if f := n.heard(t, true); f.GetDns().GetNames() != 4 || f.GetHosts()[0].GetMicrovms() != 3 || f.GetHosts()[0].GetSilent() != nil {
		t.Errorf("facts: %v, %v", f.GetDns(), f.GetHosts())
	}
	r, err := n.hub.ListLeases(t.Context(), &ingotv1.ListLeasesRequest{})
	if err != nil || len(r.GetLeases()) != 2 || r.GetLeases()[1].GetMicrovm() != "default/kept" || r.GetLeases()[1].GetIp() != "192.168.10.80" || r.GetLeases()[1].GetState() != "reserved" {
		t.Errorf("leases: %v, %v", r, err)
	}

	// Neither the hub's crash nor a host that is silent changes a name.
	kill()
	n.host.server.Stop()
	kill = start(t, n.config)
	f := n.heard(t, false)
	all()
	if h := f.GetHosts()[0]; h.GetMicrovms() != 3 || h.GetSilent() == nil {
		t.Errorf("a silent host: %v", h)
	}
	n.serve(t)
	n.heard(t, true)
	all()

	// What goes is gone at once; the name of another may be had then.
	if _, err := n.hub.ReleaseLease(t.Context(), &ingotv1.ReleaseLeaseRequest{Mac: mac(1).String()}); err != nil {
		t.Fatal(err)
	}
	n.says(t, code("web.team.lab.internal"), "NOERROR SOA")
	n.says(t, code("-x 192.168.10.26"), "NXDOMAIN SOA")
	lease("db")
	n.says(t, short+"web.team.lab.internal", "192.168.10.26")
	n.host.tell(ingotv1.WatchResponse_DELETED, microVM(1, "team", "web"))
	n.says(t, code("web.team.lab.internal"), "NXDOMAIN SOA")
	n.says(t, code("-x 192.168.10.26"), "NXDOMAIN SOA")
	for f := n.heard(t, true); f.GetDhcp().GetActive() != 0; f = n.heard(t, true) { // its lease ends with it
	}
	lease("db") // of a card that is no microVM's any more
	n.says(t, code("db.lab.internal"), "NOERROR SOA")
	n.host.tell(ingotv1.WatchResponse_DELETED, microVM(2, "default", "db"))
	n.says(t, short+"db.lab.internal", "192.168.10.26")
	n.says(t, short+"-x 192.168.10.26", "db.lab.internal.")
	n.host.tell(ingotv1.WatchResponse_CREATED, microVM(7, "team", "db"))
	n.says(t, code("db.lab.internal"), "NOERROR SOA")

	// An address is kept for a microVM, whichever card it has: this one made anew, in turn.
	keep := func(r *ingotv1.ReserveRequest) (string, error) {
		l, err := n.hub.Reserve(t.Context(), r)
		return l.GetIp(), err
	}
	if ip, err := keep(&ingotv1.ReserveRequest{Microvm: "team/lasting", Ip: "192.168.10.70"}); err != nil || ip != "192.168.10.70" {
		t.Fatalf("reserve: %s, %v", ip, err)
	}
	for _, bad := range []*ingotv1.ReserveRequest{{}, {Microvm: "lasting"}, {Microvm: "team/"}, {Microvm: "a/b/c"}, {Microvm: "team/lasting", Mac: mac(1).String()}} {
		if _, err := keep(bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("reserve %v: %v", bad, err)
		}
	}
	if _, err := keep(&ingotv1.ReserveRequest{Microvm: "team/other", Ip: "192.168.10.70"}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("reserve it for another: %v", err)
	}
	kill() // also over the next hub
	kill = start(t, n.config)
	n.heard(t, true)
	for _, number := range []int{8, 9} {
		one := microVM(number, "team", "lasting")
		n.host.tell(ingotv1.WatchResponse_CREATED, one)
		for f := n.heard(t, true); f.GetHosts()[0].GetMicrovms() != 3; f = n.heard(t, true) { // until it is known
		}
		sh(t, fmt.Sprintf("ip -n guest link set eth0 down; ip -n guest link set eth0 address %s; ip -n guest link set eth0 up", mac(number)))
		lease("box")
		n.says(t, short+"lasting.team.lab.internal", "192.168.10.70")
		n.says(t, short+"-x 192.168.10.70", "lasting.team.lab.internal.")
		r, err := n.hub.ListLeases(t.Context(), &ingotv1.ListLeasesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(r.GetLeases(), func(l *ingotv1.Lease) bool { return l.GetIp() == "192.168.10.70" })
		if l := r.GetLeases()[i]; l.GetMicrovm() != "team/lasting" || !l.GetReserved() || l.GetMac() != mac(number).String() {
			t.Errorf("its lease: %v", l)
		}
		n.host.tell(ingotv1.WatchResponse_DELETED, one)
		for f := n.heard(t, true); f.GetDhcp().GetActive() != 1; f = n.heard(t, true) { // but that of db
		}
	}
	if _, err := n.hub.Unreserve(t.Context(), &ingotv1.UnreserveRequest{Microvm: "team/lasting"}); err != nil {
		t.Error(err)
	}
	if _, err := n.hub.Unreserve(t.Context(), &ingotv1.UnreserveRequest{Microvm: "team/lasting"}); status.Code(err) != codes.NotFound {
		t.Errorf("unreserve it twice: %v", err)
	}
	// Without an address it is the one that the microVM has.
	n.host.tell(ingotv1.WatchResponse_CREATED, microVM(9, "team", "again"))
	for f := n.heard(t, true); f.GetHosts()[0].GetMicrovms() != 3; f = n.heard(t, true) {
	}
	lease("box")
	ip := strings.TrimSpace(sh(t, short+"again.team.lab.internal"))
	if got, err := keep(&ingotv1.ReserveRequest{Microvm: "team/again"}); err != nil || got != ip || ip == "" {
		t.Errorf("kept %s, %v, and it has %s", got, err, ip)
	}
	kill()
}
