package vm_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

func good() vm.Spec {
	s := vm.Spec{
		Name:       "web",
		Kernel:     vm.Kernel{File: vm.File{Image: "kernel", Path: "boot/vmlinux"}},
		Root:       vm.Volume{Image: "busybox"},
		Interfaces: []vm.Interface{{ID: "eth1", Kind: vm.Tap}},
	}
	s.Normalize()
	return s
}

func TestDefaults(t *testing.T) {
	s := good()
	if s.Namespace != "default" || s.VCPU != 2 || s.Memory != 1024 || s.Root.ID != "root" {
		t.Errorf("got %+v", s)
	}
	if err := s.Validate(); err != nil {
		t.Error(err)
	}
}

func TestValidateNamesTheField(t *testing.T) {
	for field, spoil := range map[string]func(*vm.Spec){
		"id":                       func(s *vm.Spec) { s.Name = "a/b" },
		"namespace":                func(s *vm.Spec) { s.Namespace = ".." },
		"uid":                      func(s *vm.Spec) { s.UID = "../../etc" },
		"vcpu":                     func(s *vm.Spec) { s.VCPU = 65 },
		"memory_in_mb":             func(s *vm.Spec) { s.Memory = -1 },
		"kernel.image":             func(s *vm.Spec) { s.Kernel.Image = "" },
		"kernel.filename":          func(s *vm.Spec) { s.Kernel.Path = "boot/../../etc/shadow" },
		"initrd.filename":          func(s *vm.Spec) { s.Initrd = &vm.File{Image: "kernel"} },
		"root_volume.partition_id": func(s *vm.Spec) { s.Root.Partition = "1 init=/bin/sh" },
		"root_volume.mount_point":  func(s *vm.Spec) { s.Root.MountPoint = "srv" },
		"additional_volumes[0].mount_point": func(s *vm.Spec) {
			s.Volumes = []vm.Volume{{ID: "d", Image: "x", MountPoint: "/a init=/bin/sh"}}
		},
		"kernel.cmdline":                      func(s *vm.Spec) { s.Kernel.Cmdline = map[string]string{"a b": ""} },
		"initrd.image":                        func(s *vm.Spec) { s.Initrd = &vm.File{} },
		"root_volume.source":                  func(s *vm.Spec) { s.Root.Image = "" },
		"additional_volumes[0].id":            func(s *vm.Spec) { s.Volumes = []vm.Volume{{ID: "root", Image: "x"}} },
		"interfaces[0].guest_mac":             func(s *vm.Spec) { s.Interfaces[0].MAC = "01:00:00:00:00:01" },
		"interfaces[0].device_id":             func(s *vm.Spec) { s.Interfaces[0].ID = "ETH 0" },
		"interfaces[1].device_id":             func(s *vm.Spec) { s.Interfaces = append(s.Interfaces, s.Interfaces[0]) },
		"interfaces[0].type":                  func(s *vm.Spec) { s.Interfaces[0].Kind = "veth" },
		"interfaces[0].overrides.bridge_name": func(s *vm.Spec) { s.Interfaces[0].Bridge = "../br0" },
		"interfaces[0].address": func(s *vm.Spec) {
			s.Interfaces[0].Nameservers = []netip.Addr{netip.MustParseAddr("fe80::1%x\n  - y")}
		},
		"interfaces[0].address.gateway": func(s *vm.Spec) {
			s.Interfaces[0].Address, s.Interfaces[0].Gateway = netip.MustParsePrefix("10.0.0.2/24"), netip.MustParseAddr("fd00::1")
		},
		"interfaces[1].guest_mac": func(s *vm.Spec) {
			s.Interfaces[0].MAC = "02:00:00:00:00:01"
			s.Interfaces = append(s.Interfaces, vm.Interface{ID: "eth2", Kind: vm.Tap, MAC: "02:00:00:00:00:01"})
		},
		"allowed_addresses": func(s *vm.Spec) { s.AllowedAddresses = make([]netip.Prefix, 65) },
		"allowed_addresses[1]": func(s *vm.Spec) {
			s.AllowedAddresses = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.0.0.1/24")}
		},
		"labels":                           func(s *vm.Spec) { s.Labels = map[string]string{"": "x"} },
		"metadata":                         func(s *vm.Spec) { s.Metadata = map[string]string{"": "x"} },
		"metadata[meta-data]":              func(s *vm.Spec) { s.Metadata = map[string]string{"meta-data": "a: [b"} },
		"process.env":                      func(s *vm.Spec) { s.Process.Env = map[string]string{"A=B": "c"} },
		"process":                          func(s *vm.Spec) { s.Process.Args = []string{"a\x00b"} },
		"restart_policy":                   func(s *vm.Spec) { s.Restart = "sometimes" },
		"additional_volumes[0].source":     func(s *vm.Spec) { s.Volumes = []vm.Volume{{ID: "d"}} },
		"additional_volumes[0].size_in_mb": func(s *vm.Spec) { s.Volumes = []vm.Volume{{ID: "d", Image: "x", Size: -1}} },
	} {
		t.Run(field, func(t *testing.T) {
			s := good()
			spoil(&s)
			err := s.Validate()
			var mistake *vm.FieldError
			if !errors.As(err, &mistake) || mistake.Field != field || !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAddresses(t *testing.T) {
	for text, want := range map[string]string{
		"192.168.10.25": "192.168.10.25", "192.168.10.25/32": "192.168.10.25", "10.42.0.0/16": "10.42.0.0/16", "0.0.0.0/0": "0.0.0.0/0", "fd00::25": "fd00::25", "fd00::/64": "fd00::/64",
		"": "", "10.42.0.0/33": "", "fe80::1%eth0": "", "10.42.0.0-": "",
	} {
		p, err := vm.ParseAddress(text)
		if (err == nil) != (want != "") || err == nil && vm.AddressText(p) != want {
			t.Errorf("%q: %v, %v", text, p, err)
		}
	}
}

func TestValidateKernelNeedsAFile(t *testing.T) {
	s := good()
	s.Kernel.Path = ""
	if err := s.Validate(); err == nil || !strings.Contains(err.Error(), "kernel.filename: is required") {
		t.Errorf("got %v", err)
	}
	s = good()
	for _, p := range []string{"1", "e2a1c5f0-01", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"} {
		if s.Root.Partition, s.Root.MountPoint = p, "/"; s.Validate() != nil {
			t.Errorf("partition %s: %v", p, s.Validate())
		}
	}
}

func TestValidateTellsAllMistakes(t *testing.T) {
	s := good()
	s.Name, s.VCPU, s.Kernel.Image, s.Kernel.Path = "", 0, "", "../../x"
	if got := len(strings.Split(s.Validate().Error(), "\n")); got != 4 { // each once
		t.Errorf("%d mistakes, want 4: %v", got, s.Validate())
	}
}

// Labels are such that a selector can name them, and neither they nor metadata without end.
func TestLabelsAndMetadata(t *testing.T) {
	for name, c := range map[string]struct {
		field  string
		change func(*vm.Spec)
	}{
		"a comma in a key":   {"labels", func(s *vm.Spec) { s.Labels = map[string]string{"a,b": "c"} }},
		"a line in a key":    {"labels", func(s *vm.Spec) { s.Labels = map[string]string{"a\nb": "c"} }},
		"a NUL in a value":   {"labels", func(s *vm.Spec) { s.Labels = map[string]string{"a": "b\x00"} }},
		"too many labels":    {"labels", func(s *vm.Spec) { s.Labels = map[string]string{"a": strings.Repeat("x", vm.MaxLabels)} }},
		"too much metadata":  {"metadata", func(s *vm.Spec) { s.Metadata = map[string]string{"user-data": strings.Repeat("x", vm.MaxMetadata)} }},
		"as Kubernetes does": {"", func(s *vm.Spec) { s.Labels = map[string]string{"app.kubernetes.io/name": "a b=c!", "x": ""} }},
	} {
		s := good()
		c.change(&s)
		err := s.Validate()
		var m *vm.FieldError
		if errors.As(err, &m); c.field == "" && err != nil || c.field != "" && (m == nil || m.Field != c.field) {
			t.Errorf("%s: %v, want %q", name, err, c.field)
		}
	}
}
