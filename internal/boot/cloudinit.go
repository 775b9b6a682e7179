package boot

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"

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
// is, or, where that is not made of lines, by writing all of it as JSON, which is
// YAML too.
func metaData(text string, s vm.Spec) string {
	var have map[string]any
	if yaml.Unmarshal([]byte(text), &have) != nil {
		return text // not ours to mend
	}
	all := maps.Clone(have)
	if all == nil {
		all = map[string]any{}
	}
	lines := text
	if text != "" && !strings.HasSuffix(text, "\n") {
		lines += "\n"
	}
	add := func(key, other, value string) {
		if _, ok := all[key]; ok {
			return
		}
		if v, ok := have[other].(string); ok && v != "" {
			value = v
		}
		all[key] = value
		// Quoted: a microVM may be called 123, or on.
		lines += key + ": " + strconv.Quote(value) + "\n"
	}
	add("instance_id", "instance-id", s.UID)
	add("instance-id", "instance_id", s.UID)
	add("local-hostname", "local_hostname", s.Name)
	var now map[string]any
	if yaml.Unmarshal([]byte(lines), &now) == nil && len(now) == len(all) {
		return lines
	}
	b, err := json.Marshal(all)
	if err != nil {
		return text
	}
	return string(b) + "\n"
}

// vendorData adds the volumes' mounts to a cloud-config. Any other kind of
// vendor-data (a script, a MIME archive) stays as it is.
func vendorData(text string, s vm.Spec) (string, bool) {
	devices := blockDevices(s)
	var mounts []any
	for _, v := range s.Volumes {
		if v.MountPoint != "" && v.VirtioFS == "" {
			mounts = append(mounts, []any{devices[v.ID], v.MountPoint})
		}
	}
	if len(mounts) == 0 {
		return "", false
	}
	var config yaml.MapSlice
	if text != "" {
		if !strings.Contains(text, "#cloud-config") || yaml.Unmarshal([]byte(text), &config) != nil {
			return "", false
		}
	}
	at := -1
	for i, item := range config {
		if item.Key == "mounts" {
			at = i
		}
	}
	if at < 0 {
		config = append(config,
			yaml.MapItem{Key: "mounts", Value: mounts},
			yaml.MapItem{Key: "mount_default_fields", Value: []any{"None", "None", "auto", "defaults,nofail", "0", "2"}})
	} else if own, ok := config[at].Value.([]any); ok {
		config[at].Value = append(own, mounts...)
	}
	b, err := yaml.Marshal(config)
	if err != nil {
		return "", false
	}
	return "## template: jinja\n#cloud-config\n\n" + string(b), true
}
