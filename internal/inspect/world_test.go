package inspect

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
)

// world is an environment whose services say what a test wants them to say. The
// real ones are inspected by the scripts in cmd/ingot/testdata/e2e; here it is
// about faults that are hard to make, or slow, in a real one.
type world struct {
	hub   *hubWorld
	hosts []*hostWorld
	env   Environment
}

type hubWorld struct {
	v1.UnimplementedHubServer
	mu      sync.Mutex // guards what is below
	facts   *v1.HubFacts
	leases  []*v1.Lease
	dead    []string // addresses that answer no ping
	latency time.Duration
}

type hostWorld struct {
	v1.UnimplementedHostServer
	v1alpha1.UnimplementedMicroVMServer
	mu      sync.Mutex // guards what is below
	facts   *v1.HostFacts
	vms     []*types.MicroVM
	missing []string // files
	exec    func(uid string, args []string) (int32, string, error)
	latency time.Duration
}

// green is a hub and two hosts, on each of which n microVMs run, all well.
func green(t testing.TB, n int) *world {
	t.Helper()
	w := &world{hub: &hubWorld{facts: hubFacts()}, env: Environment{Name: "lab"}}
	s := grpc.NewServer()
	v1.RegisterHubServer(s, w.hub)
	w.env.Hub = serve(t, s, "network-hub", "192.168.10.2", "192.168.10.2:9091")
	for i := range 2 {
		h := &hostWorld{facts: hostFacts(i)}
		for k := range n {
			vm, lease, links := newVM(fmt.Sprintf("vm-%d-%d", i, k), 26+i*n+k)
			h.vms = append(h.vms, vm)
			h.facts.Interfaces = append(h.facts.Interfaces, links...)
			h.facts.Containerd.LeaseIds = append(h.facts.Containerd.LeaseIds, leaseID(vm))
			w.hub.leases = append(w.hub.leases, lease)
		}
		h.facts.Microvms, h.facts.MicrovmsRunning = int32(n), int32(n)
		s := grpc.NewServer()
		v1.RegisterHostServer(s, h)
		v1alpha1.RegisterMicroVMServer(s, h)
		w.hosts = append(w.hosts, h)
		w.env.Hosts = append(w.env.Hosts, serve(t, s, fmt.Sprint("host-", i), fmt.Sprint("192.168.10.", 3+i), fmt.Sprintf("192.168.10.%d:9090", 3+i)))
	}
	return w
}

// serve gives a server a connection in memory.
func serve(t testing.TB, s *grpc.Server, name, address, endpoint string) Machine {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient("passthrough:///"+name, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return Machine{Name: name, Address: netip.MustParseAddr(address), Endpoint: endpoint, Conn: conn}
}

const (
	forwardRule    = "ipv4 filter FORWARD 0 -i bond0.1000 -o bond0 -j ACCEPT"
	masqueradeRule = "ipv4 nat POSTROUTING 0 -o bond0 -j MASQUERADE"
)

func hubFacts() *v1.HubFacts {
	return &v1.HubFacts{
		Hostname: "network-hub", Version: "1.0", Uptime: durationpb.New(3 * time.Minute), RssBytes: 21 << 20, ConfigFile: "/etc/ingot/hub.yaml",
		Interfaces: []*v1.InterfaceFacts{
			{Name: "bond0.1000", Index: 2, Mac: "02:00:00:00:00:02", Addresses: []string{"192.168.10.2/25", "fe80::1/64"}, Up: true},
			{Name: "bond0", Index: 3, Mac: "02:00:00:00:00:03", Addresses: []string{"100.64.0.2/30"}, Up: true},
		},
		Dhcp: &v1.DHCPFacts{
			Serving: true, Interface: "bond0.1000", Subnet: "192.168.10.0/25", RangeFirst: "192.168.10.26", RangeLast: "192.168.10.126",
			DefaultLease: durationpb.New(10 * time.Minute), MaxLease: durationpb.New(2 * time.Hour), Active: 2, Free: 99,
			ConfigFile: "/etc/dhcp/dhcpd.conf", LeasesFile: "/var/lib/dhcp/dhcpd.leases", DefaultsFile: "/etc/default/isc-dhcp-server",
			Config: "default-lease-time 600;\nauthoritative;\n",
		},
		Dns:   &v1.DNSFacts{Serving: true, Listen: []string{"192.168.10.2:53"}, Upstreams: []string{"9.9.9.9:53"}, Names: 5},
		Hosts: []*v1.HeardHost{{Name: "host-0", Heard: true, Microvms: 1}, {Name: "host-1", Heard: true, Microvms: 1}},
		Nat: &v1.NATFacts{Forwarding: true, Inside: "bond0.1000", Outside: "bond0",
			Rules: []*v1.NATRule{{Rule: forwardRule, Present: true}, {Rule: masqueradeRule, Present: true}}},
		Registry: &v1.RegistryFacts{Serving: true, Address: "192.168.10.2:5000", Repositories: []string{"busybox", "kernel"}, Dir: "/var/lib/ingot/registry"},
	}
}

func hostFacts(i int) *v1.HostFacts {
	return &v1.HostFacts{
		Hostname: fmt.Sprint("host-", i), Version: "1.0", Uptime: durationpb.New(2 * time.Minute), Vcpus: 4,
		MemoryBytes: 8 << 30, MemoryAvailableBytes: 6 << 30, MemoryCommittedBytes: 512 << 20, VcpusCommitted: 2, MicrovmsCommitted: 2,
		MemoryLimitBytes: 7 << 30, VcpusLimit: 256, DaemonRssBytes: 35 << 20,
		Drivers:       []*v1.DriverFacts{{Name: "qemu", Available: true, Version: "7.2.19", Accelerator: "tcg", Reason: "KVM: the probe's guest never ran"}},
		DefaultDriver: "qemu", ConfigFile: "/etc/opt/flintlockd/config.yaml", StateDir: "/var/lib/flintlock/vm", GrpcEndpoint: "0.0.0.0:9090", Kernel: "6.1.0",
		BootTime: timestamppb.Now(),
		Containerd: &v1.ContainerdFacts{Socket: "/run/containerd/containerd.sock", Version: "2.4.2", Serving: true, Namespace: "flintlock",
			Snapshotter: "blockfile", Images: 2, Leases: 1, Snapshots: 3, Content: 9, ContentBytes: 30 << 20, ImageNames: []string{"busybox", "kernel"}},
		Pool:       &v1.PoolFacts{Path: "/var/lib/containerd/pool", Kind: "loop", SizeBytes: 10 << 30, UsedBytes: 1 << 30, BackingFreeBytes: 40 << 30, Reflink: true},
		Interfaces: []*v1.InterfaceFacts{{Name: "bond0.1000", Addresses: []string{fmt.Sprintf("192.168.10.%d/25", 3+i)}, Up: true}},
	}
}

func newVM(name string, last int) (*types.MicroVM, *v1.Lease, []*v1.InterfaceFacts) {
	uid := "01K" + name
	ip := fmt.Sprintf("192.168.10.%d", last)
	mac := fmt.Sprintf("02:00:00:00:01:%02x", last)
	vm := &types.MicroVM{
		Spec: &types.MicroVMSpec{Id: name, Namespace: "default", Uid: &uid, Vcpu: 1, MemoryInMb: 256, AllowGuestAgent: true,
			Kernel:     &types.Kernel{Image: "kernel", Filename: new("boot/vmlinux")},
			RootVolume: &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: new("busybox")}}},
		Status: &types.MicroVMStatus{State: types.MicroVMStatus_CREATED, Phase: "running", Driver: "qemu", Accelerator: "tcg", Pid: int32(4000 + last),
			StartedAt: timestamppb.New(time.Now().Add(-90 * time.Second)), BootTime: durationpb.New(3 * time.Second), AgentReady: true,
			Addresses: []string{ip}, Dir: "/var/lib/flintlock/vm/default/" + name + "/" + uid,
			NetworkInterfaces: map[string]*types.NetworkInterfaceStatus{
				"eth0": {HostDeviceName: "fltap0" + name, GuestMac: "AA:FF:00:00:00:01"},
				"eth1": {HostDeviceName: "fltap1" + name, GuestMac: mac},
			}},
	}
	return vm, &v1.Lease{Ip: ip, Mac: mac, Hostname: name, State: "active", Ends: timestamppb.Now()}, []*v1.InterfaceFacts{
		{Name: "fltap0" + name, Kind: "tun", Up: true, VmUid: uid},
		{Name: "fltap1" + name, Kind: "tun", Up: true, VmUid: uid, Master: "ingot0"},
	}
}

func (h *hubWorld) Facts(context.Context, *emptypb.Empty) (*v1.HubFacts, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	<-time.After(h.latency)
	return h.facts, nil
}

func (h *hubWorld) ListLeases(context.Context, *v1.ListLeasesRequest) (*v1.ListLeasesResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return &v1.ListLeasesResponse{Leases: h.leases}, nil
}

func (h *hubWorld) Ping(_ context.Context, r *v1.PingRequest) (*v1.PingResponse, error) {
	<-time.After(h.latency)
	if slices.Contains(h.dead, r.GetAddress()) {
		return nil, status.Error(codes.DeadlineExceeded, "no reply within 2s")
	}
	return &v1.PingResponse{RoundTrip: durationpb.New(400 * time.Microsecond)}, nil
}

func (h *hostWorld) Facts(context.Context, *emptypb.Empty) (*v1.HostFacts, error) {
	<-time.After(h.latency)
	return h.facts, nil
}

func (h *hostWorld) ListMicroVMs(context.Context, *v1alpha1.ListMicroVMsRequest) (*v1alpha1.ListMicroVMsResponse, error) {
	<-time.After(h.latency)
	h.mu.Lock()
	defer h.mu.Unlock()
	return &v1alpha1.ListMicroVMsResponse{Microvm: h.vms}, nil
}

func (h *hostWorld) Logs(r *v1.LogsRequest, s grpc.ServerStreamingServer[v1.LogsResponse]) error {
	<-time.After(h.latency)
	if slices.Contains(h.missing, r.GetFile()) {
		return status.Errorf(codes.NotFound, "open %s: no such file", r.GetFile())
	}
	return s.Send(&v1.LogsResponse{Data: []byte("x")})
}

func (h *hostWorld) Exec(s grpc.BidiStreamingServer[v1.ExecRequest, v1.ExecResponse]) error {
	r, err := s.Recv()
	if err != nil {
		return err
	}
	<-time.After(h.latency)
	code, out := int32(0), ""
	if h.exec != nil {
		if code, out, err = h.exec(r.GetStart().GetUid(), r.GetStart().GetArgs()); err != nil {
			return err
		}
	}
	if err := s.Send(&v1.ExecResponse{Payload: &v1.ExecResponse_Stdout{Stdout: []byte(out)}}); err != nil && err != io.EOF {
		return err
	}
	return s.Send(&v1.ExecResponse{Payload: &v1.ExecResponse_ExitCode{ExitCode: code}})
}
