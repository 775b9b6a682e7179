package boot

import (
	"fmt"
	"maps"
	"net/netip"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"

	"ingot/internal/vm"
)

// NetworkConfig is the spec's interfaces as cloud-init's network configuration,
// version 2: a static address where the spec has one, else DHCP. Interfaces are
// found by MAC; without one, by name.
func NetworkConfig(s vm.Spec) (string, error) {
	var b strings.Builder
	b.WriteString("version: 2\nethernets:\n")
	for _, i := range s.Interfaces {
		if i.ID == "" || strings.ContainsAny(i.ID, ": \t\n#") {
			return "", fmt.Errorf("network configuration: interface id %q: %w", i.ID, errdefs.ErrInvalidArgument)
		}
		fmt.Fprintf(&b, "  %s:\n    match:\n", i.ID)
		if i.MAC != "" {
			fmt.Fprintf(&b, "      macaddress: %s\n", strings.ToUpper(i.MAC))
		} else {
			fmt.Fprintf(&b, "      name: %s\n", i.ID)
		}
		dhcp := !i.Address.IsValid()
		if !dhcp {
			fmt.Fprintf(&b, "    addresses:\n    - %s\n", i.Address)
		}
		if i.Gateway.IsValid() {
			fmt.Fprintf(&b, "    gateway%d: %s\n", family(i.Gateway), i.Gateway)
		}
		fmt.Fprintf(&b, "    dhcp4: %t\n    dhcp6: %t\n    dhcp-identifier: mac\n", dhcp, dhcp)
		if len(i.Nameservers) > 0 {
			b.WriteString("    nameservers:\n      addresses:\n")
			for _, n := range i.Nameservers {
				fmt.Fprintf(&b, "      - %s\n", n)
			}
		}
	}
	return b.String(), nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

// Metadata is what the metadata service serves: what the spec has, what flintlock
// adds to it (instance_id), and what cloud-init's NoCloud source does not go
// without: instance-id and local-hostname in meta-data (with hyphens; flintlock's
// clients write underscores, which cloud-init does not read), a user-data that may
// be empty, and the mounts of the spec's volumes in vendor-data.
func Metadata(s vm.Spec) map[string]string {
	m := maps.Clone(s.Metadata)
	if m == nil {
		m = map[string]string{}
	}
	m["meta-data"] = metaData(m["meta-data"], s)
	if _, ok := m["user-data"]; !ok {
		m["user-data"] = ""
	}
	if v, ok := vendorData(m["vendor-data"], s); ok {
		m["vendor-data"] = v
	}
	return m
}

// metaData adds what is missing to text: as lines, so that the rest stays as it
// is, or, where that is not made of lines, by writing all of it anew.
func metaData(text string, s vm.Spec) string {
	have, err := vm.Mapping(text)
	if err != nil {
		return text // not ours to mend
	}
	lines := text
	if text != "" && !strings.HasSuffix(text, "\n") {
		lines += "\n"
	}
	add := func(key, other, value string) {
		if field(have, key) != nil {
			return
		}
		if v := field(have, other); v != nil && v.ShortTag() == "!!str" && v.Value != "" {
			value = v.Value
		}
		// Quoted: a microVM may be called 123, or on.
		have.Content = append(have.Content, scalar(key), &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Style: yaml.DoubleQuotedStyle, Value: value})
		lines += key + ": " + strconv.Quote(value) + "\n"
	}
	add("instance_id", "instance-id", s.UID)
	add("instance-id", "instance_id", s.UID)
	add("local-hostname", "local_hostname", s.Name)
	if now, err := vm.Mapping(lines); err == nil && len(now.Content) == len(have.Content) {
		return lines
	}
	all, err := written(have)
	if err != nil {
		return text
	}
	return all
}

// field is the value that a mapping has for a key, nil if it has none.
func field(mapping *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == key {
			return mapping.Content[i+1]
		}
	}
	return nil
}

func scalar(value string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(value)
	return n
}

func scalars(values ...string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.SequenceNode}
	for _, v := range values {
		n.Content = append(n.Content, scalar(v))
	}
	return n
}

// written is YAML in flintlock's form.
func written(n *yaml.Node) (string, error) {
	var b strings.Builder
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	e.CompactSeqIndent()
	if err := e.Encode(n); err != nil {
		return "", err
	}
	return b.String(), e.Close()
}

// vendorData adds the volumes' mounts to a cloud-config. Any other kind of
// vendor-data (a script, a MIME archive) stays as it is.
func vendorData(text string, s vm.Spec) (string, bool) {
	devices := blockDevices(s)
	var mounts []*yaml.Node
	for _, v := range s.Volumes {
		if v.MountPoint != "" && v.VirtioFS == "" {
			mounts = append(mounts, scalars(devices[v.ID], v.MountPoint))
		}
	}
	if len(mounts) == 0 || text != "" && !strings.Contains(text, "#cloud-config") {
		return "", false
	}
	config, err := vm.Mapping(text)
	if err != nil {
		return "", false
	}
	own := field(config, "mounts")
	switch {
	case own == nil:
		config.Content = append(config.Content, scalar("mounts"), &yaml.Node{Kind: yaml.SequenceNode, Content: mounts},
			scalar("mount_default_fields"), scalars("None", "None", "auto", "defaults,nofail", "0", "2"))
	case own.Kind == yaml.SequenceNode:
		own.Content = append(own.Content, mounts...)
	}
	all, err := written(config)
	if err != nil {
		return "", false
	}
	return "## template: jinja\n#cloud-config\n\n" + all, true
}
