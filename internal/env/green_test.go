package env

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"ingot/internal/doctor"
	"ingot/internal/inspect"
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
