package hub

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
)

// alone is a hub's configuration, with a guest's namespace behind its segment, and who
// asks the hub.
func alone(t *testing.T) (config string, hub ingotv1.HubClient) {
	t.Helper()
	segment(t)
	dir, config := configured(t, only, nil)
	return config, operator(t, dir)
}

func TestImport(t *testing.T) {
	config, hub := alone(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	begins := func() {
		t.Helper()
		start(t, config)
		if _, err := hub.Facts(ctx, &emptypb.Empty{}, grpc.WaitForReady(true)); err != nil {
			t.Fatal(err)
		}
	}
	begins()
	const old = `default-lease-time 1234;
option ntp-servers 192.168.10.4;
option routers 192.168.10.1;
subnet 192.168.10.0 netmask 255.255.255.128 { range 192.168.10.16 192.168.10.60; }
`
	configure := func(text string, changed bool) {
		t.Helper()
		r, err := hub.ConfigureDHCP(ctx, &ingotv1.ConfigureDHCPRequest{Config: text})
		if err != nil || r.GetChanged() != changed {
			t.Fatalf("configure: %v, %v", r, err)
		}
		if text == old && (len(r.GetLeft()) != 1 || r.GetLeft()[0].GetLine() != 3) {
			t.Errorf("left: %v", r.GetLeft())
		}
		for changed { // until it has ended
			if _, err := hub.Facts(ctx, &emptypb.Empty{}); status.Code(err) == codes.Unavailable {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := hub.ConfigureDHCP(ctx, &ingotv1.ConfigureDHCPRequest{Config: "subnet {"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("what is no configuration: %v", err)
	}
	write(t, mkdir(t, filepath.Dir(importedFile))+"/"+filepath.Base(importedFile)+".new", "of an earlier try")
	configure(old, true)
	if info, err := os.Stat(importedFile); err != nil || info.Mode() != 0o600 {
		t.Errorf("keys in what is imported are for all to read: %v, %v", info.Mode(), err)
	}
	begins()
	configure(old, false)
	mac := strings.TrimSpace(sh(t, "ip netns exec guest cat /sys/class/net/eth0/address"))
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	r, err := hub.ImportLeases(ctx, &ingotv1.ImportLeasesRequest{Leases: []*ingotv1.Lease{
		{Ip: "192.168.10.17", Mac: mac, State: "active", Hostname: "box", Starts: timestamppb.Now(), Ends: timestamppb.New(end)},
		{Ip: "192.168.10.126", Mac: "02:00:00:00:00:01", State: "reserved"},
		{Ip: "10.1.1.1", Mac: "02:00:00:00:00:02", State: "active", Ends: timestamppb.New(end)},
	}})
	if err != nil || len(r.GetLeft()) != 1 || r.GetLeft()[0].GetIp() != "10.1.1.1" || r.GetLeft()[0].GetReason() == "" {
		t.Fatalf("import: %v, %v", r, err)
	}
	for _, wrong := range []*ingotv1.Lease{{Ip: "x", Mac: mac}, {Ip: "192.168.10.30", Mac: "x"}} {
		if _, err := hub.ImportLeases(ctx, &ingotv1.ImportLeasesRequest{Leases: []*ingotv1.Lease{wrong}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", wrong, err)
		}
	}
	show := write(t, filepath.Dir(config)+"/show", "#!/bin/sh\nenv | grep -E '^(ip|lease|ntpsrv|router|domain)='\n")
	client := func() string {
		return sh(t, "ip netns exec guest busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -O ntpsrv -s "+show+" 2>&1")
	}
	got := client()
	for _, want := range []string{"ip=192.168.10.17", "lease=1234", "ntpsrv=192.168.10.4", "router=192.168.10.2", "domain=lab.internal"} {
		if !strings.Contains(got, want+"\n") {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	// Taken away again, it is the environment's alone, and .17 is in no range.
	configure("", true)
	begins()
	if got := client(); !strings.Contains(got, "lease=600\n") || strings.Contains(got, "ip=192.168.10.17\n") {
		t.Errorf("without the old configuration:\n%s", got)
	}
}
