package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/reflection/grpc_reflection_v1"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
)

// TestRestart ends guests of each restart policy in each way: by power-off, reboot
// and panic.
func TestRestart(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	again := "running" // as another process
	for _, c := range []struct {
		policy                  types.RestartPolicy
		poweroff, reboot, panic string
	}{
		{types.RestartPolicy_ALWAYS, "stopped", again, again},
		{types.RestartPolicy_ON_FAILURE, "stopped", "stopped", again},
		{types.RestartPolicy_NEVER, "stopped", "stopped", "failed"},
	} {
		s := spec(c.policy.String())
		s.RestartPolicy = &c.policy
		r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
		if err != nil {
			t.Fatal(err)
		}
		uid := r.Microvm.Spec.GetUid()
		for _, end := range []struct{ how, want string }{{"poweroff", c.poweroff}, {"reboot", c.reboot}, {"panic", c.panic}} {
			if p := m.phase(t, uid); p == "stopped" {
				if _, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid}); err != nil {
					t.Fatal(err)
				}
			}
			m.await(t, uid, "running")
			before := m.status(t, uid)
			ctx, leave := context.WithCancel(t.Context())
			m.typeLine(ctx, t, uid, end.how)
			var now *types.MicroVMStatus
			await(t, end.how+" of "+c.policy.String()+" to be "+end.want, func() bool {
				now = m.status(t, uid)
				return now.GetPhase() == end.want && now.GetPid() != before.GetPid()
			})
			leave()
			if end.want == "failed" {
				if r, err := m.host.Restart(t.Context(), &ingotv1.RestartRequest{Uid: uid}); err != nil || r.Microvm.Status.GetPhase() != "running" {
					t.Errorf("restart of a failed one: %v, %v", r, err)
				}
			}
			if restarted := now.GetRestarts() > before.GetRestarts(); restarted != (end.want == again) {
				t.Errorf("%s of %s: %d restarts, before it %d", end.how, c.policy, now.GetRestarts(), before.GetRestarts())
			}
			if crashed := now.GetLastCrashAt().AsTime().After(before.GetStartedAt().AsTime()); crashed != (end.how == "panic") {
				t.Errorf("%s of %s: it counts as a crash: %v", end.how, c.policy, crashed)
			}
		}
		m.remove(t, uid)
	}
	m.expectNothing(t)
}

// typeLine types a line on a guest's console, which stays open until ctx ends.
func (m *testMachine) typeLine(ctx context.Context, t testing.TB, uid, line string) {
	t.Helper()
	stream, err := m.host.Console(ctx)
	if err == nil {
		err = stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Uid{Uid: uid}})
	}
	if err == nil {
		err = stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Data{Data: []byte(line + "\n")}})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// ask types a line on a hollow guest's console, and returns what there is to be read
// up to the end of the answer.
func (m *testMachine) ask(t testing.TB, uid, line string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := m.host.Console(ctx)
	if err != nil {
		t.Fatal(err)
	}
	mark := fmt.Sprint(time.Now().UnixNano())
	for _, r := range []*ingotv1.ConsoleRequest{
		{Payload: &ingotv1.ConsoleRequest_Uid{Uid: uid}},
		{Payload: &ingotv1.ConsoleRequest_Data{Data: []byte(line + "\necho " + mark + "\n")}},
	} {
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	for text := ""; ; {
		r, err := stream.Recv()
		if err != nil {
			t.Fatalf("%v after %q", err, text)
		}
		text += string(r.GetData())
		if before, _, ok := strings.Cut(text, "echoed "+mark); ok {
			return before
		}
	}
}

// TestConsoleAgain: whoever comes while the last viewer of a console leaves sees it.
func TestConsoleAgain(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	uid := m.create(t, "seen")
	m.await(t, uid, "running")
	for i := range 100 {
		word := fmt.Sprint("word", i)
		if got := m.ask(t, uid, "echo "+word); !strings.Contains(got, "echoed "+word) {
			t.Errorf("%s: %q", word, got)
		}
	}
	m.remove(t, uid)
	m.expectNothing(t)
}

// TestReflection asks the daemon what it serves, as grpcurl does.
func TestReflection(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	stream, err := grpc_reflection_v1.NewServerReflectionClient(m.conn).ServerReflectionInfo(t.Context())
	if err == nil {
		err = stream.Send(&grpc_reflection_v1.ServerReflectionRequest{
			MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	r, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range r.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	for _, want := range []string{"microvm.services.api.v1alpha1.MicroVM", "ingot.v1.Host"} {
		if !slices.Contains(names, want) {
			t.Errorf("%q without %s", names, want)
		}
	}
}
