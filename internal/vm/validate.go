package vm

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"go.yaml.in/yaml/v3"
)

// The metadata interface, as flintlock's guests know it.
const (
	MetadataInterface = "eth0"
	MetadataMAC       = "AA:FF:00:00:00:01"
)

// Normalize fills in what a spec leaves out.
func (s *Spec) Normalize() {
	if s.Namespace == "" {
		s.Namespace = DefaultNamespace
	}
	if s.VCPU == 0 {
		s.VCPU = DefaultVCPU
	}
	if s.Memory == 0 {
		s.Memory = DefaultMemory
	}
	if s.Root.ID == "" {
		s.Root.ID = "root"
	}
}

// Names become parts of paths, of lease ids and of host names (RFC 1123 labels,
// and dots and underscores, which flintlock's clients use).
var (
	nameRule  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
	ifaceRule = regexp.MustCompile(`^[a-z][a-z0-9_]{0,14}$`)
	// A bridge is the operator's own, whatever he calls it.
	bridgeRule = regexp.MustCompile(`^[!-.0-~]{1,15}$`)
	// A partition is its number, or its UUID as GPT or MBR has it.
	partitionRule = regexp.MustCompile(`^([0-9]{1,3}|[0-9A-Fa-f]{8}-([0-9A-Fa-f]{2}|[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}))$`)
	uidRule       = regexp.MustCompile(`^[0-9A-HJKMNP-TV-Z]{26}$`) // a ULID
)

// ValidName says whether a microVM, or a namespace, can be called so.
func ValidName(name string) bool { return nameRule.MatchString(name) }

// FieldError is one mistake in a spec. It is an errdefs.ErrInvalidArgument.
type FieldError struct {
	Field   string // as the API names it: root_volume.source
	Problem string
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Problem }

// Unwrap makes a FieldError an errdefs.ErrInvalidArgument.
func (e *FieldError) Unwrap() error { return errdefs.ErrInvalidArgument }

// Validate returns all mistakes of a normalized spec, each a *FieldError.
func (s Spec) Validate() error {
	var all mistakes
	all.check(nameRule.MatchString(s.Name), "id", "%q is not a name: letters, digits, '.', '_' and '-', 63 at most, a letter or digit first and last", s.Name)
	all.check(nameRule.MatchString(s.Namespace), "namespace", "%q is not a name", s.Namespace)
	all.check(s.UID == "" || uidRule.MatchString(s.UID), "uid", "%q is not a ULID", s.UID)
	all.check(s.VCPU >= 1 && s.VCPU <= MaxVCPU, "vcpu", "%d is not between 1 and %d", s.VCPU, MaxVCPU)
	all.check(s.Memory >= MinMemory && s.Memory <= MaxMemory, "memory_in_mb", "%d is not between %d and %d", s.Memory, MinMemory, MaxMemory)
	all.image("kernel.image", s.Kernel.Image)
	all.path("kernel.filename", s.Kernel.Path)
	all.labels(s.Labels)
	size := 0
	for key, value := range s.Metadata {
		size += len(key) + len(value)
	}
	all.check(size <= MaxMetadata, "metadata", "has %d bytes in all, more than %d", size, MaxMetadata)
	for key, value := range s.Kernel.Cmdline {
		all.check(key != "" && !strings.ContainsAny(key+value, "\n\x00") && !strings.ContainsAny(key, " \t="), "kernel.cmdline", "%q=%q can't stand on a command line", key, value)
	}
	if s.Initrd != nil {
		all.image("initrd.image", s.Initrd.Image)
		all.path("initrd.filename", s.Initrd.Path)
	}
	s.validateVolumes(&all)
	s.validateInterfaces(&all)
	s.validateAddresses(&all)
	s.validateMetadata(&all)
	s.Process.validate(&all)
	switch s.Restart {
	case RestartAlways, RestartOnFailure, RestartNever:
	default:
		all.add("restart_policy", "%q is not one", s.Restart)
	}
	return errors.Join(all...)
}

func (s Spec) validateVolumes(all *mistakes) {
	all.volume("root_volume", s.Root)
	all.check(s.Root.VirtioFS == "", "root_volume.source", "the root can't be a shared directory")
	seen := map[string]bool{s.Root.ID: true}
	for i, v := range s.Volumes {
		field := fmt.Sprintf("additional_volumes[%d]", i)
		all.volume(field, v)
		all.check(!seen[v.ID], field+".id", "%q is there twice", v.ID)
		seen[v.ID] = true
	}
}

func (s Spec) validateInterfaces(all *mistakes) {
	seen := map[string]bool{}
	for i, n := range s.Interfaces {
		field := fmt.Sprintf("interfaces[%d]", i)
		all.check(ifaceRule.MatchString(n.ID), field+".device_id", "%q is not an interface's name", n.ID)
		all.check(!seen[n.ID], field+".device_id", "%q is there twice", n.ID)
		seen[n.ID] = true
		all.check(n.Kind == Tap || n.Kind == Macvtap, field+".type", "%q is neither TAP nor MACVTAP", n.Kind)
		all.check(n.Bridge == "" || bridgeRule.MatchString(n.Bridge) && n.Bridge != "." && n.Bridge != "..",
			field+".overrides.bridge_name", "%q is not an interface's name", n.Bridge)
		if n.MAC != "" {
			mac, err := net.ParseMAC(n.MAC)
			all.check(err == nil && len(mac) == 6 && mac[0]&1 == 0 && !bytes.Equal(mac, make([]byte, 6)), field+".guest_mac", "%q is not a card's MAC address", n.MAC)
			all.check(!seen[mac.String()], field+".guest_mac", "%q is there twice", n.MAC)
			seen[mac.String()] = true // no interface is called so
		}
		all.check(!n.Gateway.IsValid() || n.Address.IsValid(), field+".address.gateway", "a gateway needs an address")
		all.check(!n.Gateway.IsValid() || n.Address.Addr().Is4() == n.Gateway.Is4(), field+".address.gateway", "%s and %s are not of one family", n.Gateway, n.Address)
		for _, a := range slices.Concat(n.Nameservers, []netip.Addr{n.Gateway}) { // a zone is the guest's own, and may be any text
			all.check(a.Zone() == "", field+".address", "%q has a zone", a)
		}
	}
}

// maxAddresses bounds how many prefixes a microVM is allowed.
const maxAddresses = 64

func (s Spec) validateAddresses(all *mistakes) {
	all.check(len(s.AllowedAddresses) <= maxAddresses, "allowed_addresses", "there are %d, more than %d", len(s.AllowedAddresses), maxAddresses)
	for i, p := range s.AllowedAddresses {
		field := fmt.Sprintf("allowed_addresses[%d]", i)
		all.check(p.IsValid() && !p.Addr().Is4In6(), field, "%s is neither an address nor a prefix", p)
		all.check(p == p.Masked(), field, "%s is an address within a prefix: write %s or %s", p, p.Masked(), p.Addr())
	}
}

// ParseAddress reads an address, or a prefix.
func ParseAddress(text string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(text); err == nil {
		return p, nil
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return netip.Prefix{}, fmt.Errorf("%q is neither an address nor a prefix", text)
	}
	return netip.PrefixFrom(a, a.BitLen()), nil
}

// AddressText is how ParseAddress reads a prefix, as short as it can be.
func AddressText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// validateMetadata wants what is added to later to be such that it can be.
func (s Spec) validateMetadata(all *mistakes) {
	for key := range s.Metadata {
		all.check(key != "", "metadata", "a value has no name")
	}
	_, err := Mapping(s.Metadata["meta-data"])
	all.check(err == nil, "metadata[meta-data]", "it is not YAML: %.200v", err)
}

// Mapping reads YAML of a client's that is to be a mapping, or nothing. It stays as it is
// written: a kilobyte of aliases of aliases is terabytes when they are followed.
func Mapping(text string) (*yaml.Node, error) {
	var document yaml.Node
	if err := yaml.Unmarshal([]byte(text), &document); err != nil {
		return nil, err
	}
	if len(document.Content) == 0 || document.Content[0].ShortTag() == "!!null" {
		return &yaml.Node{Kind: yaml.MappingNode}, nil
	}
	if n := document.Content[0]; n.Kind == yaml.MappingNode {
		return n, nil
	}
	return nil, errors.New("it is not a mapping")
}

func (p Process) validate(all *mistakes) {
	for key, value := range p.Env {
		all.check(key != "" && !strings.ContainsAny(key, "=\x00") && !strings.Contains(value, "\x00"), "process.env", "%q can't be a variable", key)
	}
	for _, word := range slices.Concat(p.Entrypoint, p.Args, []string{p.Dir, p.User, p.StopSignal}) {
		all.check(!strings.Contains(word, "\x00"), "process", "%q has a NUL in it", word)
	}
}

type mistakes []error

func (m *mistakes) add(field, format string, a ...any) {
	*m = append(*m, &FieldError{Field: field, Problem: fmt.Sprintf(format, a...)})
}

func (m *mistakes) check(ok bool, field, format string, a ...any) {
	if !ok {
		m.add(field, format, a...)
	}
}

func (m *mistakes) image(field, ref string) {
	m.check(ref != "", field, "is required")
	if ref == "" {
		return
	}
	_, err := reference.ParseNormalizedNamed(ref)
	m.check(len(ref) <= 512 && err == nil, field, "%q is not an image's name: %v", ref, err)
}

// path checks a path inside an image. What leads out of it is refused here, and
// can't be opened either.
func (m *mistakes) path(field, path string) {
	m.check(path != "", field, "is required")
	m.check(!strings.ContainsRune(path, 0) && len(path) <= 4096, field, "%q is not a path", path)
	m.check(!slices.Contains(strings.Split(path, "/"), ".."), field, "%q leads out of the image", path)
}

func (m *mistakes) volume(field string, v Volume) {
	m.check(nameRule.MatchString(v.ID), field+".id", "%q is not a volume's name", v.ID)
	m.check(v.Image == "" || v.VirtioFS == "", field+".source", "is both an image and a directory")
	m.check(v.Image != "" || v.VirtioFS != "", field+".source", "is required")
	if v.Image != "" {
		m.image(field+".source.container_source", v.Image)
	}
	// It becomes a word of the kernel's command line, with the device before a colon.
	m.check(v.MountPoint == "" || strings.HasPrefix(v.MountPoint, "/") && len(v.MountPoint) <= 255 && !strings.ContainsFunc(v.MountPoint, noPath),
		field+".mount_point", "%q is not an absolute path without blanks, quotes and colons", v.MountPoint)
	m.check(v.Partition == "" || partitionRule.MatchString(v.Partition), field+".partition_id", "%q is neither a partition's number nor its UUID", v.Partition)
	m.check(v.Size >= 0 && v.Size <= 1<<24, field+".size_in_mb", "%d is not a size", v.Size)
}

func noPath(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) || r == ':' || r == '"' }

// What labels and metadata may have: they are in each answer about a microVM, and labels in
// each line of the journal of events.
const (
	MaxLabels   = 16 << 10 // bytes of all keys and values
	MaxMetadata = 2 << 20
)

// labels are such that a selector can name them.
func (m *mistakes) labels(labels map[string]string) {
	size := 0
	for key, value := range labels {
		size += len(key) + len(value)
		switch {
		case key == "":
			m.check(false, "labels", "a label has no name")
		case strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune("=!,()", r) }):
			m.check(false, "labels", "%q has a blank or one of = ! , ( )", key)
		case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f || r == ',' }):
			m.check(false, "labels", "the value of %s has a comma or a control character", key)
		}
	}
	m.check(size <= MaxLabels, "labels", "have %d bytes in all, more than %d", size, MaxLabels)
}
