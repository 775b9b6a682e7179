package hub

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

// newPublisher is a hub with a guest behind it, and somebody outside.
func newPublisher(t *testing.T) *neighbourhood {
	t.Helper()
	n := newNeighbourhood(t)
	sh(t, `set -e; ip netns add outside; ip link set world netns outside; ip addr add 203.0.113.2/24 dev uplink
		ip -n outside addr add 203.0.113.9/24 dev world; ip -n outside link set world up; ip -n outside link set lo up`)
	t.Cleanup(func() {
		os.Remove(accessFile)
		if out, err := exec.Command("ip", "netns", "del", "outside").CombinedOutput(); err != nil {
			t.Errorf("clean up: %v\n%s", err, out)
		}
	})
	return n
}

// lease has the guest ask for an address, and route by the hub.
func (n *neighbourhood) lease(t *testing.T) {
	t.Helper()
	set := write(t, n.dir+"/set", "#!/bin/sh\n[ -z $ip ] || { ip addr flush dev eth0; ip addr add $ip/25 dev eth0; ip route replace default via 192.168.10.2; }\n")
	sh(t, "ip netns exec guest busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -s "+set+" 2>&1")
}

// serveIn has a namespace answer at a TCP port, until the test ends.
func serveIn(t *testing.T, ns, port string) {
	t.Helper()
	c := exec.Command("ip", "netns", "exec", ns, "busybox", "nc", "-ll", "-p", port, "-e", "echo", "here")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
}

// gets says whether somebody gets an answer, which may be a moment later if it is wanted.
func gets(t *testing.T, ns, address, port string, want bool) {
	t.Helper()
	got := false
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		out, _ := exec.Command("ip", "netns", "exec", ns, "timeout", "2", "busybox", "nc", "-w", "1", address, port).Output()
		if got = strings.TrimSpace(string(out)) == "here"; got == want {
			return
		}
	}
	t.Errorf("%s gets an answer at %s:%s: %v", ns, address, port, got)
}

func tcpPort(outside, inside uint32) *ingotv1.Port {
	return &ingotv1.Port{Protocol: "tcp", Port: outside, To: inside}
}

// TestPorts: what is published is there until the microVM is gone, whatever happens to
// the hub, and follows its address.
func TestPorts(t *testing.T) {
	n := newPublisher(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	web, db := microVM(1, "team", "web"), microVM(2, "default", "db")
	n.host.tell(ingotv1.WatchResponse_CREATED, web)
	n.host.tell(ingotv1.WatchResponse_CREATED, db)
	n.serve(t)
	kill := start(t, n.config)
	n.heard(t, true)
	n.lease(t)
	serveIn(t, "guest", "80")
	serveIn(t, "guest", "81")
	publish := func(vm *types.MicroVM, replace bool, ports ...*ingotv1.Port) error {
		_, err := n.hub.PublishPorts(ctx, &ingotv1.PublishPortsRequest{Uid: vm.GetSpec().GetUid(), Ports: ports, Replace: replace}, grpc.WaitForReady(true))
		return err
	}
	gets(t, "outside", "203.0.113.2", "8080", false)
	for range 2 { // twice changes nothing
		if err := publish(web, false, tcpPort(8080, 80), tcpPort(8081, 81)); err != nil {
			t.Fatal(err)
		}
	}
	gets(t, "outside", "203.0.113.2", "8080", true)
	gets(t, "outside", "203.0.113.2", "8081", true)

	at := func(address, protocol string, outside uint32) *ingotv1.Port {
		return &ingotv1.Port{Address: address, Protocol: protocol, Port: outside, To: 80}
	}
	for _, c := range []struct {
		vm   *types.MicroVM
		port *ingotv1.Port
		want codes.Code
	}{
		{db, tcpPort(8080, 80), codes.AlreadyExists}, {web, tcpPort(8080, 81), codes.AlreadyExists}, {db, at("203.0.113.2", "tcp", 8080), codes.AlreadyExists},
		{db, tcpPort(9091, 80), codes.FailedPrecondition}, {db, tcpPort(5000, 80), codes.FailedPrecondition},
		{db, at("", "udp", 53), codes.FailedPrecondition}, {db, at("", "udp", 67), codes.FailedPrecondition},
		{db, at("203.0.113.7", "tcp", 8090), codes.InvalidArgument}, {db, at("192.168.10.2", "tcp", 8090), codes.InvalidArgument},
		{db, at("", "icmp", 8090), codes.InvalidArgument}, {db, tcpPort(0, 80), codes.InvalidArgument}, {db, tcpPort(8090, 0), codes.InvalidArgument},
		{db, tcpPort(70000, 80), codes.InvalidArgument}, {&types.MicroVM{}, tcpPort(8080, 80), codes.AlreadyExists}, {&types.MicroVM{}, tcpPort(8090, 80), codes.OK},
	} {
		if err := publish(c.vm, false, c.port); status.Code(err) != c.want {
			t.Errorf("publish %v: %v, want %s", c.port, err, c.want)
		}
	}
	l, err := n.hub.ListPorts(ctx, &ingotv1.ListPortsRequest{})
	if err != nil || len(l.GetPorts()) != 2 || len(l.GetAddresses()) != 1 || l.GetAddresses()[0] != "203.0.113.2" || l.GetPorts()[0].GetName() != "web" ||
		l.GetPorts()[0].GetNamespace() != "team" || l.GetPorts()[0].GetGuestAddress() != "192.168.10.26" || l.GetPorts()[1].GetPort().GetTo() != 81 {
		t.Errorf("list: %v, %v", l, err)
	}
	f, err := n.hub.Facts(ctx, &emptypb.Empty{})
	if rules := f.GetNat().GetRules(); err != nil || len(rules) != 4 || len(f.GetNat().GetMissing()) != 0 {
		t.Errorf("rules: %v, %v", rules, err)
	}

	// A crash changes nothing, also while the host is silent.
	for range 5 {
		kill()
		n.host.server.Stop()
		gets(t, "outside", "203.0.113.2", "8080", true)
		kill = start(t, n.config)
		n.heard(t, false)
		gets(t, "outside", "203.0.113.2", "8080", true)
		n.serve(t)
		n.heard(t, true)
	}

	// Another address.
	if _, err := n.hub.Reserve(ctx, &ingotv1.ReserveRequest{Mac: mac(1).String(), Ip: "192.168.10.50"}); err != nil {
		t.Fatal(err)
	}
	n.lease(t)
	if got := sh(t, "ip -n guest -4 -o addr show eth0"); !strings.Contains(got, "192.168.10.50/25") {
		t.Fatalf("the guest has %s", got)
	}
	gets(t, "outside", "203.0.113.2", "8080", true)

	// Taken away one by one, or all for others.
	unpublish := func(vm *types.MicroVM, ports ...*ingotv1.Port) error {
		_, err := n.hub.UnpublishPorts(ctx, &ingotv1.UnpublishPortsRequest{Uid: vm.GetSpec().GetUid(), Ports: ports})
		return err
	}
	if err := unpublish(web, tcpPort(8081, 0)); err != nil {
		t.Error(err)
	}
	gets(t, "outside", "203.0.113.2", "8081", false)
	for _, err := range []error{unpublish(web, tcpPort(8081, 0)), unpublish(db), unpublish(web, tcpPort(8080, 81))} {
		if status.Code(err) != codes.NotFound {
			t.Errorf("what is not published: %v", err)
		}
	}
	if err := publish(web, true, tcpPort(8082, 81)); err != nil {
		t.Error(err)
	}
	gets(t, "outside", "203.0.113.2", "8082", true)
	gets(t, "outside", "203.0.113.2", "8080", false)

	// Gone while the hub was away.
	kill()
	n.host.tell(ingotv1.WatchResponse_DELETED, web)
	start(t, n.config)
	n.heard(t, true)
	gets(t, "outside", "203.0.113.2", "8082", false)
	if l, err := n.hub.ListPorts(ctx, &ingotv1.ListPortsRequest{}); err != nil || len(l.GetPorts()) != 0 {
		t.Errorf("of a microVM that is gone: %v, %v", l, err)
	}
	if err := publish(web, false, tcpPort(8080, 80)); status.Code(err) != codes.NotFound {
		t.Errorf("publish for what is gone: %v", err)
	}
	if err := publish(db, false, tcpPort(8082, 80)); err != nil {
		t.Error(err)
	}
}

// TestEgress: what a microVM may open is what was said, over a crash of the hub and with
// another address.
func TestEgress(t *testing.T) {
	n := newPublisher(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	web := microVM(1, "team", "web")
	n.host.tell(ingotv1.WatchResponse_CREATED, web)
	n.serve(t)
	kill := start(t, n.config)
	n.heard(t, true)
	n.lease(t)
	serveIn(t, "outside", "80")
	serveIn(t, "outside", "81")
	set := func(rules ...string) error {
		_, err := n.hub.SetEgress(ctx, &ingotv1.SetEgressRequest{Uid: web.GetSpec().GetUid(), Rules: rules}, grpc.WaitForReady(true))
		return err
	}
	so := func(first, second bool) {
		t.Helper()
		gets(t, "guest", "203.0.113.9", "80", first)
		gets(t, "guest", "203.0.113.9", "81", second)
	}
	so(true, true)
	if err := set("allow 203.0.113.9 81/tcp", "deny all"); err != nil {
		t.Fatal(err)
	}
	so(false, true)
	for _, rules := range [][]string{{"deny"}, {"allow all"}, {"deny all", "allow 10.0.0.1"}} {
		if err := set(rules...); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", rules, err)
		}
	}
	kill()
	so(false, true)
	start(t, n.config)
	n.heard(t, true)
	so(false, true)
	if _, err := n.hub.Reserve(ctx, &ingotv1.ReserveRequest{Mac: mac(1).String(), Ip: "192.168.10.50"}); err != nil {
		t.Fatal(err)
	}
	n.lease(t)
	gets(t, "guest", "203.0.113.9", "80", false)
	so(false, true)
	l, err := n.hub.ListEgress(ctx, &ingotv1.ListEgressRequest{})
	if err != nil || len(l.GetEgress()) != 1 || l.GetEgress()[0].GetGuestAddress() != "192.168.10.50" || strings.Join(l.GetEgress()[0].GetRules(), ", ") != "allow 203.0.113.9 81/tcp, deny all" {
		t.Errorf("list: %v, %v", l, err)
	}
	if f := n.heard(t, true); len(f.GetNat().GetRules()) != 3 || len(f.GetNat().GetMissing()) != 0 {
		t.Errorf("rules: %v", f.GetNat())
	}
	if err := set(); err != nil {
		t.Error(err)
	}
	so(true, true)
}
