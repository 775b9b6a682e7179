package host

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// A clock that was set back by hours, which a new daemon sees only by what was noted
// before, makes nobody wait for hours.
func TestClockSetBack(t *testing.T) {
	v := testInstance(t)
	ahead := time.Now().Add(5 * time.Hour)
	status, err := json.Marshal(vm.Status{Phase: vm.Pending, Retry: 3, RetryAt: ahead})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(v.dir, statusName), status, 0o600); err != nil {
		t.Fatal(err)
	}
	r := v.record
	if got := newInstance(v.host, r).status.RetryAt; got.IsZero() || time.Until(got) > lastDelay {
		t.Errorf("the next try is in %v", time.Until(got))
	}
	for patience, most := range map[time.Duration]time.Duration{0: defaultPatience, time.Second: time.Second, time.Hour: time.Hour} {
		r.Stopped, r.StopBy, r.Patience = true, ahead, patience
		if got := newInstance(v.host, r).record.StopBy; time.Until(got) > most || time.Until(got) < most-time.Minute {
			t.Errorf("a guest that had %v has %v", patience, time.Until(got))
		}
	}
	r.StopBy = time.Now().Add(-time.Hour)
	if got := newInstance(v.host, r).record.StopBy; !got.Equal(r.StopBy) {
		t.Errorf("a time that is over became %v", got)
	}
}

// Within a daemon no clock that is set matters: its times are monotonic.
func TestTimesAreMonotonic(t *testing.T) {
	v := testInstance(t)
	monotonic := func(what string, at time.Time) {
		t.Helper()
		if !strings.Contains(at.String(), " m=") {
			t.Errorf("%s is %v, by the clock on the wall", what, at)
		}
	}
	v.failed(errors.New("no"))
	monotonic("the next try", v.view().Status.RetryAt)
	v.ended(vmm.Exit{Cause: vmm.Killed, At: time.Now()})
	monotonic("the next start", v.view().Status.RetryAt)
	by := time.Now().Add(time.Minute)
	if err := v.want(func(r *record) error { r.Stopped, r.StopBy = true, by; return nil }); err != nil {
		t.Fatal(err)
	}
	monotonic("the end of a guest's patience", v.record.StopBy)
}

// What could not be written down is, once it can.
func TestStatusIsWrittenLater(t *testing.T) {
	v := testInstance(t)
	if err := os.Rename(v.dir, v.dir+".away"); err != nil {
		t.Fatal(err)
	}
	v.set(func(s *vm.Status) { s.Phase, s.Restarts = vm.Running, 7 })
	v.save()
	if at := v.next(); at.IsZero() || time.Until(at) > saveDelay {
		t.Errorf("it is tried again at %v", at)
	}
	if err := os.Rename(v.dir+".away", v.dir); err != nil {
		t.Fatal(err)
	}
	v.save()
	if s := readStatus(v.dir); s.Restarts != 7 || !v.next().IsZero() {
		t.Errorf("%+v; again at %v", s, v.next())
	}
}
