package main

import (
	"os"
	"os/exec"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/need"
	"ingot/internal/pool"
	"ingot/internal/vm"
)

// TestResize: a running microVM's disk is larger from its next start on, also
// when another daemon starts it.
func TestResize(t *testing.T) {
	need.Binary(t, "resize2fs")
	need.Binary(t, "e2fsck")
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	uid := m.create(t, "one")
	m.await(t, uid, "running")
	resize := func(volume string, size int64) error {
		_, err := m.host.Resize(t.Context(), &ingotv1.ResizeRequest{Uid: uid, VolumeId: volume, SizeInMb: size})
		return err
	}
	path := m.list(t)[0].Status.Volumes["root"].GetMount().GetSource()
	size := func() int64 {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size() >> 20
	}
	was := size()
	for what, c := range map[string]struct {
		err  error
		code codes.Code
	}{
		"smaller":          {resize("", was-1), codes.InvalidArgument},
		"no such volume":   {resize("data", 64), codes.InvalidArgument},
		"more than a pool": {resize("", 100_000), codes.ResourceExhausted},
		"more than a size": {resize("", 1<<40), codes.InvalidArgument},
	} {
		if status.Code(c.err) != c.code {
			t.Errorf("%s: %v", what, c.err)
		}
	}
	for range 2 {
		if err := resize("root", 64); err != nil {
			t.Fatal(err)
		}
	}
	if now, asked := size(), m.list(t)[0].Spec.RootVolume.GetSizeInMb(); now != was || asked != 64 {
		t.Errorf("it runs with %d MiB, asked for are %d", now, asked)
	}
	m.daemon.Process.Kill()
	m.daemon.Wait()
	m.startDaemon(t)
	m.await(t, uid, "running")
	if err := resize("", 63); status.Code(err) != codes.InvalidArgument {
		t.Errorf("less than was asked for before: %v", err)
	}
	if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid}); err != nil {
		t.Fatal(err)
	}
	m.await(t, uid, "running")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := pool.Ext4Size(f); err != nil || n != vm.MiB(64).Bytes() || size() != 64 {
		t.Errorf("the file has %d MiB, its file system %d bytes: %v", size(), n, err)
	}
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	m.remove(t, uid)
	m.expectNothing(t)
}
