package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/need"
)

// TestBadInput: what can't work is refused with the field's name, or fails with
// the reason shown; nothing is left of it, and the daemon lives on.
func TestBadInput(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	pid := m.daemon.Process.Pid
	for name, c := range map[string]struct {
		change func(*types.MicroVMSpec)
		code   codes.Code
		says   string
	}{
		"no name":              {func(s *types.MicroVMSpec) { s.Id = "" }, codes.InvalidArgument, "id: "},
		"a way out":            {func(s *types.MicroVMSpec) { s.Id = "../../etc" }, codes.InvalidArgument, "id: "},
		"a directory":          {func(s *types.MicroVMSpec) { s.Namespace = ".." }, codes.InvalidArgument, "namespace: "},
		"an over-long name":    {func(s *types.MicroVMSpec) { s.Id = strings.Repeat("x", 300) }, codes.InvalidArgument, "id: "},
		"a line break":         {func(s *types.MicroVMSpec) { s.Kernel.Cmdline = map[string]string{"a": "b\nc"} }, codes.InvalidArgument, "kernel.cmdline: "},
		"no kernel":            {func(s *types.MicroVMSpec) { s.Kernel = nil }, codes.InvalidArgument, "kernel"},
		"no root":              {func(s *types.MicroVMSpec) { s.RootVolume = nil }, codes.InvalidArgument, "root_volume"},
		"a file outside":       {func(s *types.MicroVMSpec) { s.Kernel.Filename = ptr("../../etc/shadow") }, codes.InvalidArgument, "kernel.filename: "},
		"no CPU":               {func(s *types.MicroVMSpec) { s.Vcpu = -1 }, codes.InvalidArgument, "vcpu: "},
		"too little memory":    {func(s *types.MicroVMSpec) { s.MemoryInMb = 1 }, codes.InvalidArgument, "memory_in_mb: "},
		"too much memory":      {func(s *types.MicroVMSpec) { s.MemoryInMb = 1 << 20 }, codes.ResourceExhausted, "memory_in_mb: "},
		"no such provider":     {func(s *types.MicroVMSpec) { s.Provider = ptr("bochs") }, codes.InvalidArgument, "provider"},
		"a bad MAC address":    {func(s *types.MicroVMSpec) { s.Interfaces[0].GuestMac = ptr("02:00") }, codes.InvalidArgument, "interfaces[0]"},
		"everybody's MAC":      {func(s *types.MicroVMSpec) { s.Interfaces[0].GuestMac = ptr("ff:ff:ff:ff:ff:ff") }, codes.InvalidArgument, "interfaces[0]"},
		"a bad address":        {func(s *types.MicroVMSpec) { s.Interfaces[0].Address = &types.StaticAddress{Address: "10.0.0.300/24"} }, codes.InvalidArgument, "interfaces[0]"},
		"an interface twice":   {func(s *types.MicroVMSpec) { s.Interfaces = append(s.Interfaces, s.Interfaces[0]) }, codes.InvalidArgument, "interfaces[1]"},
		"a missing interface":  {func(s *types.MicroVMSpec) { s.Interfaces = append(s.Interfaces, nil) }, codes.InvalidArgument, "interfaces[1]"},
		"a volume twice":       {func(s *types.MicroVMSpec) { s.AdditionalVolumes = []*types.Volume{s.RootVolume} }, codes.InvalidArgument, "additional_volumes[0]"},
		"a missing volume":     {func(s *types.MicroVMSpec) { s.AdditionalVolumes = []*types.Volume{nil} }, codes.InvalidArgument, "additional_volumes[0]"},
		"a nameless registry":  {func(s *types.MicroVMSpec) { s.Kernel.Image = "none" }, codes.InvalidArgument, "kernel.image: image none names no registry, and there is no default one"},
		"an image with spaces": {func(s *types.MicroVMSpec) { s.Kernel.Image = "a b" }, codes.InvalidArgument, "kernel.image: "},
		// Of images that are here it is known what is in them.
		"no such file":       {func(s *types.MicroVMSpec) { s.Kernel.Filename = ptr("boot/none") }, codes.InvalidArgument, `kernel.filename: image test.local/kernel:latest has no file "boot/none"`},
		"a kernel directory": {func(s *types.MicroVMSpec) { s.Kernel.Filename = ptr("boot") }, codes.InvalidArgument, "kernel.filename: "},
		"no such initrd": {func(s *types.MicroVMSpec) {
			s.Initrd = &types.Initrd{Image: s.Kernel.Image, Filename: ptr("boot/none")}
		}, codes.InvalidArgument, "initrd.filename: "},
	} {
		s := spec("bad")
		c.change(s)
		_, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
		if status.Code(err) != c.code || !strings.Contains(status.Convert(err).Message(), c.says) {
			t.Errorf("%s: %v, want %s and %q", name, err, c.code, c.says)
		}
	}
	m.expectNothing(t)

	// What only shows once the images are asked for, which are not here.
	empty := httptest.NewServer(http.NotFoundHandler())
	defer empty.Close()
	registry := strings.TrimPrefix(empty.URL, "http://")
	none := func(s *types.MicroVMSpec) { s.Kernel.Image = registry + "/none:latest" }
	for _, c := range []struct {
		name   string
		change func(*types.MicroVMSpec)
		phase  string
		says   string
	}{
		// Nothing listens there: it may be tried again.
		{"no registry", func(s *types.MicroVMSpec) { s.RootVolume.Source.ContainerSource = ptr("127.0.0.1:1/none:latest") }, "pending", "127.0.0.1:1"},
		{"no such image", none, "failed", registry + "/none"},
	} {
		s, name := spec("bad"), c.name
		c.change(s)
		r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		uid := r.Microvm.Spec.GetUid()
		var reason string
		await(t, name+" to be told", func() bool {
			for _, vm := range m.list(t) {
				reason = vm.Status.GetReason()
				return reason != "" && vm.Status.GetPhase() == c.phase
			}
			return false
		})
		if !strings.Contains(reason, c.says) {
			t.Errorf("%s: %q does not name %q", name, reason, c.says)
		}
		began := time.Now()
		m.remove(t, uid)
		if d := time.Since(began); d > 3*time.Second {
			t.Errorf("%s: it took %v to remove", name, d)
		}
	}
	m.expectNothing(t)

	// What `ingot run` has made of it is not left.
	s := spec("bad")
	none(s)
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
	if err != nil {
		t.Fatal(err)
	}
	host := &hostClient{HostClient: m.host, MicroVMClient: m.vms}
	c := &cloud{hosts: []*hostClient{host}, hub: &hubClient{HubClient: ingotv1.NewHubClient(m.conn)}} // there is no hub to answer
	vm, err := up(t.Context(), microVM{r.Microvm, host}, &progress{w: io.Discard, told: map[string]bool{}})
	if err == nil || !strings.Contains(err.Error(), registry+"/none") {
		t.Errorf("up: %v", err)
	}
	if hint := c.afterFailure(t.Context(), vm, false); hint != "it is deleted again" {
		t.Errorf("hint %q", hint)
	}
	m.expectNothing(t)
	if m.daemon.Process.Pid != pid || m.daemon.ProcessState != nil {
		t.Error("the daemon has ended")
	}
	m.remove(t, m.create(t, "good"))
}
