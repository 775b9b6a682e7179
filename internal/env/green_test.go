package env

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"ingot/internal/doctor"
	"ingot/internal/inspect"
	"ingot/internal/need"
)

// TestDiagnosis: only what is known to stop packets is a fault of the lab's. A
// machine without a network can be green.
func TestDiagnosis(t *testing.T) {
	for _, c := range []struct {
		f       doctor.Finding
		status  inspect.Status
		lasting bool
		detail  string
	}{
		{doctor.Finding{Name: "forwarding", Status: doctor.Warn, Detail: "no default route", Fix: "ip route add"}, inspect.Warn, false, "no default route; ip route add"},
		{doctor.Finding{Name: "forwarding", Status: doctor.Fail, Detail: "read-only", Fix: "--privileged"}, inspect.Warn, false, "read-only; --privileged"},
		{doctor.Finding{Name: "firewall", Status: doctor.Warn, Detail: "dropped by x", Fix: "nft insert", Fixable: true}, inspect.Fail, true,
			"dropped by x; `ingot doctor --fix firewall`: nft insert"},
		{doctor.Finding{Name: "firewall", Status: doctor.Pass, Detail: "well"}, inspect.Pass, false, "well"},
		{doctor.Finding{Name: "firewall", Status: doctor.Skip, Detail: "only root sees it"}, inspect.Skip, false, "only root sees it"},
	} {
		got := diagnosis(c.f)
		if got.Status != c.status || got.Lasting != c.lasting || got.Detail != c.detail {
			t.Errorf("%s %s: %+v", c.f.Status, c.f.Detail, got)
		}
	}
}

// TestInterruptedUp says that it was interrupted, not that time was up.
func TestInterruptedUp(t *testing.T) {
	conn, err := grpc.NewClient("127.0.0.1:1", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	u := &up{Options: Options{Out: io.Discard}, name: "none", conns: Conns{Hub: conn},
		env: Env{Name: "none", Machines: []Machine{{Name: "hub", Hub: true}}}}
	why := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, err := u.awaitGreen(ctx); !errors.Is(err, why) {
		t.Errorf("interrupted: %v", err)
	}
	u.Wait = 1
	if _, err := u.awaitGreen(t.Context()); err == nil || !strings.Contains(err.Error(), "not green after") {
		t.Errorf("too late: %v", err)
	}
}

// TestAnotherSubnetIsSaid has another environment and a route of this machine in
// the way of what is usual.
func TestAnotherSubnetIsSaid(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		if out, err := exec.Command("sh", "-ec", "ip link set lo up; ip route add 192.168.8.0/22 dev lo").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		var said bytes.Buffer
		u := &up{Options: Options{Out: &said, Binary: "ingot"}, name: "second", others: []Env{{Name: "first", Subnet: netip.MustParsePrefix("10.1.0.0/24"), Uplink: usualUplink}}}
		if err := u.decide(); err != nil {
			t.Error(err)
		}
		const want = "note: 192.168.12.0/25 is used instead of 192.168.10.0/25, which overlaps with this machine's route to 192.168.8.0/22 by lo\n" +
			"note: 100.64.0.4/30 is used instead of 100.64.0.0/30, which environment first has\n"
		if said.String() != want {
			t.Errorf("%s", said.String())
		}
	}()
	<-done
}

// TestHear has somebody ping this machine, which has a network for itself.
func TestHear(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "ping")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		heard, err := hear(ctx)
		if err != nil {
			t.Error(err)
			return
		}
		if out, err := exec.Command("sh", "-ec", "ip link set lo up; ping -c 1 -W 2 -I 127.0.0.7 127.0.0.1").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		for range 2 {
			if from := heard(); len(from) != 1 || from[0] != netip.MustParseAddr("127.0.0.7") {
				t.Errorf("from %v", from)
			}
		}
	}()
	<-done
}

// An interrupt is told as one, whatever it made of the step.
func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	u := &up{name: "one"}
	killed := errors.New("dpkg-deb: signal: killed")
	if err := u.failed(ctx, "images", killed); !errors.Is(err, killed) {
		t.Errorf("not interrupted: %v", err)
	}
	cancel(errors.New("interrupt signal received")) // as signal.NotifyContext has it
	if err := u.failed(ctx, "images", killed); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}
