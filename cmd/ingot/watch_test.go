package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
)

// watcher sees what happens on a host, from daemon to daemon.
type watcher struct {
	m      *testMachine
	mu     sync.Mutex
	seen   []*ingotv1.WatchResponse
	synced bool
}

// watch begins to watch, until ctx ends.
func (m *testMachine) watch(ctx context.Context, t *testing.T, all *sync.WaitGroup, r *ingotv1.WatchRequest) *watcher {
	t.Helper()
	w := &watcher{m: m}
	all.Go(func() {
		for ctx.Err() == nil {
			err := w.follow(ctx, r)
			if c := status.Code(err); c != codes.Unavailable && c != codes.Canceled {
				t.Errorf("watch: %v", err)
				return
			}
		}
	})
	await(t, "the watch", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.synced })
	return w
}

func (w *watcher) follow(ctx context.Context, r *ingotv1.WatchRequest) error {
	stream, err := w.m.host.Watch(ctx, r, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	for {
		e, err := stream.Recv()
		if err != nil {
			return err
		}
		r.Resume = e.Cursor
		w.mu.Lock()
		if e.Kind == ingotv1.WatchResponse_SYNCED {
			w.synced = true
		} else {
			w.seen = append(w.seen, e)
		}
		w.mu.Unlock()
	}
}

// of are the events of one microVM, as words.
func (w *watcher) of(uid string) (all []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.seen {
		if e.GetMicrovm().GetSpec().GetUid() != uid {
			continue
		}
		word := e.GetMicrovm().GetStatus().GetPhase()
		switch e.Kind {
		case ingotv1.WatchResponse_CREATED:
			word = "created"
		case ingotv1.WatchResponse_DELETED:
			word = "deleted"
		}
		if len(all) == 0 || all[len(all)-1] != word {
			all = append(all, word)
		}
	}
	return all
}

// firstOf is the error of a watch that has nothing to tell.
func (m *testMachine) firstOf(t *testing.T, r *ingotv1.WatchRequest) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := m.host.Watch(ctx, r)
	if err == nil {
		_, err = stream.Recv()
	}
	return err
}

// execOnce is the error of a command before it has said anything.
func (m *testMachine) execOnce(t *testing.T, uid string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := m.host.Exec(ctx)
	if err == nil {
		err = stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: &ingotv1.ExecStart{Uid: uid, Args: []string{"true"}}}})
	}
	if err == nil {
		_, err = stream.Recv()
	}
	return err
}

// TestWatch watches a microVM's whole life, of which a restarted daemon tells the rest.
func TestWatch(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	var all sync.WaitGroup
	defer all.Wait()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	w := m.watch(ctx, t, &all, &ingotv1.WatchRequest{})
	web := m.watch(ctx, t, &all, &ingotv1.WatchRequest{Namespace: "test", Selector: "app=web"})

	uid := m.create(t, "one")
	m.await(t, uid, "running")
	if _, err := m.host.Update(t.Context(), &ingotv1.UpdateRequest{Uid: uid, Labels: map[string]string{"app": "web", "tier": "x"}}); err != nil {
		t.Fatal(err)
	}
	if r, err := m.host.Pause(t.Context(), &ingotv1.PauseRequest{Uid: uid}); err != nil || r.Microvm.Status.GetPhase() != "paused" {
		t.Fatalf("pause: %v, %v", r, err)
	}
	if err := m.execOnce(t, uid); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a command in a paused one: %v", err)
	}
	m.killDaemon()
	m.startDaemon(t)
	if p := m.phase(t, uid); p != "paused" {
		t.Errorf("after the daemon's restart it is %s", p)
	}
	if _, err := m.host.Resume(t.Context(), &ingotv1.ResumeRequest{Uid: uid}); err != nil {
		t.Fatal(err)
	}
	before := m.status(t, uid).GetPid()
	if r, err := m.host.Restart(t.Context(), &ingotv1.RestartRequest{Uid: uid, Timeout: durationpb.New(0)}); err != nil || r.Microvm.Status.GetPid() == before {
		t.Fatalf("restart: %v, %v", r, err)
	}
	if _, err := m.host.Pause(t.Context(), &ingotv1.PauseRequest{Uid: uid}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid, Timeout: durationpb.New(5 * time.Second)}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.host.Pause(t.Context(), &ingotv1.PauseRequest{Uid: uid}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("pause of a stopped one: %v", err)
	}
	if _, err := m.host.Update(t.Context(), &ingotv1.UpdateRequest{Uid: uid, RemoveLabels: []string{"app"}}); err != nil {
		t.Fatal(err)
	}
	m.killDaemon()
	m.startDaemon(t)
	m.remove(t, uid)
	want := []string{"created", "pending", "starting", "running", "paused", "running", "stopping", "stopped", "pending", "starting", "running",
		"paused", "running", "stopping", "stopped", "deleting", "deleted"}
	await(t, "the last event", func() bool { got := w.of(uid); return len(got) > 0 && got[len(got)-1] == "deleted" })
	if got := w.of(uid); !slices.Equal(got, want) {
		t.Errorf("events\n%q, want\n%q", got, want)
	}
	// What has the label only for a while is watched for that while.
	if got := web.of(uid); len(got) < 3 || got[0] != "running" || got[len(got)-1] != "deleted" {
		t.Errorf("by label: %q", got)
	}
	w.mu.Lock()
	last := w.seen[len(w.seen)-1].Cursor
	w.mu.Unlock()
	for _, c := range []struct {
		what string
		r    *ingotv1.WatchRequest
		want codes.Code
	}{
		{"a cursor of elsewhere", &ingotv1.WatchRequest{Resume: "other-1"}, codes.OutOfRange},
		{"one that is gone, from its end on", &ingotv1.WatchRequest{Uid: uid, Resume: last}, codes.NotFound},
		{"one that is gone, by another label", &ingotv1.WatchRequest{Uid: uid, Selector: "app=other", Resume: w.seen[0].Cursor}, codes.NotFound},
	} {
		if err := m.firstOf(t, c.r); status.Code(err) != c.want {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	stop()
}

// askAtOnce asks for one microVM many times at the same moment.
func (m *testMachine) askAtOnce(t *testing.T, ask func(name, key string) (string, error)) {
	t.Helper()
	var mu sync.Mutex
	uids := map[string]bool{}
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			uid, err := ask("c9", "at once")
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			uids[uid] = true
		})
	}
	all.Wait()
	if len(uids) != 1 {
		t.Errorf("asked for one: %v", uids)
	}
	for uid := range uids {
		m.remove(t, uid)
	}
}

// TestAskedAgain asks twice for one microVM, by uid and by key, and looks at many by
// pages.
func TestAskedAgain(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	ask := func(name, key string) (string, error) {
		s := spec(name)
		s.Labels = map[string]string{"name": name}
		r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s, RequestKey: key})
		return r.GetMicrovm().GetSpec().GetUid(), err
	}
	uid, err := ask("a", "key")
	if err != nil {
		t.Fatal(err)
	}
	m.await(t, uid, "running")
	if _, err := m.host.Update(t.Context(), &ingotv1.UpdateRequest{Uid: uid, Labels: map[string]string{"more": "x"},
		Metadata: map[string]string{"user-data": base64.StdEncoding.EncodeToString([]byte("#!/bin/true\n"))}}); err != nil {
		t.Fatal(err)
	}
	for _, restart := range []bool{false, true} {
		if restart {
			m.killDaemon()
			m.startDaemon(t)
		}
		if again, err := ask("a", "key"); err != nil || again != uid {
			t.Errorf("again: %s, %v, want %s", again, err, uid)
		}
		if _, err := ask("b", "key"); status.Code(err) != codes.AlreadyExists {
			t.Errorf("another one with the same key: %v", err)
		}
	}
	for i := range 4 {
		if _, err := ask(fmt.Sprint("c", i), ""); err != nil {
			t.Fatal(err)
		}
	}
	m.askAtOnce(t, ask)
	var names []string
	for token, pages := "", 0; ; pages++ {
		r, err := m.host.List(t.Context(), &ingotv1.ListRequest{Selector: "name!=c1", PageSize: 2, PageToken: token})
		if err != nil || pages > 2 || len(r.Microvms) > 2 {
			t.Fatalf("page %d: %v, %v", pages, r, err)
		}
		for _, vm := range r.Microvms {
			names = append(names, vm.Spec.Id)
		}
		if token = r.NextPageToken; token == "" {
			break
		}
	}
	if !slices.Equal(names, []string{"a", "c0", "c2", "c3"}) {
		t.Errorf("listed %q", names)
	}
	if _, err := m.host.List(t.Context(), &ingotv1.ListRequest{Selector: "a in (b)"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("selector: %v", err)
	}
	for _, vm := range m.list(t) {
		m.remove(t, vm.Spec.GetUid())
	}
	uid2, err := ask("b", "key")
	if err != nil || uid2 == uid {
		t.Errorf("the key of one that is gone: %s, %v", uid2, err)
	}
	m.remove(t, uid2)
	m.expectNothing(t)
}
