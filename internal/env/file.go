package env

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"ingot/internal/nat"
)

// format is the version of the file's form. Format 1 was written by `up` alone,
// before there were files of users.
const format = 2

// maxFile keeps a file that is no environment's from being read.
const maxFile = 1 << 20

// Declaration is what a file says, and only that: a zero value was left out.
type Declaration struct {
	Name           string
	Subnet, Uplink netip.Prefix
	DHCP           DHCP
	VPN            *VPN       // nil: none
	Tailscale      *Tailscale // nil: the hub is in no tailnet
	Resolvers      []netip.AddrPort
	Machines       []Machine // none: the usual three
	MicroVMs       []MicroVM

	source
}

// Parse reads a file. The error is Objections: every mistake, with its line.
func Parse(file string, data []byte) (Declaration, error) {
	r := &reader{mistakes{source: source{file: file, lines: map[string]int{}}}}
	d := Declaration{}
	if root := r.document(data); root != nil {
		r.read(root, &d)
		d.source = r.source
		d.check(&r.mistakes)
	}
	return d, r.objections().err()
}

// reader turns YAML into values, and notes the line of each key.
type reader struct{ mistakes }

// fields are the keys that a mapping may have.
type fields map[string]func(n *yaml.Node, key string)

func (r *reader) document(data []byte) *yaml.Node {
	if len(data) > maxFile {
		r.add("", "it has %d bytes, and %d are the most", len(data), maxFile)
		return nil
	}
	var doc, second yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	err := dec.Decode(&doc)
	if err == nil && !errors.Is(dec.Decode(&second), io.EOF) {
		r.lines[""] = max(second.Line, 1)
		r.all = append(r.all, &Mistake{File: r.file, Line: max(second.Line, 1), Problem: "one document is enough: take away what begins here"})
	}
	switch {
	case errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0:
		r.add("", "it is empty: `ingot init` writes one to begin with")
		return nil
	case err != nil:
		r.all = append(r.all, syntax(r.file, err))
		return nil
	}
	return doc.Content[0]
}

var syntaxLine = regexp.MustCompile(`^yaml: line (\d+): `)

// syntax is a mistake for which the file can't be read any further.
func syntax(file string, err error) *Mistake {
	m := &Mistake{File: file, Line: 1, Problem: strings.TrimPrefix(err.Error(), "yaml: ")}
	if at := syntaxLine.FindStringSubmatch(err.Error()); at != nil {
		m.Line, _ = strconv.Atoi(at[1])
		m.Problem = strings.TrimPrefix(err.Error(), at[0])
	}
	m.Problem = "it is not YAML: " + m.Problem
	return m
}

func (r *reader) read(root *yaml.Node, d *Declaration) {
	known := fields{
		"format": func(n *yaml.Node, key string) {
			if v, ok := r.number(n, key); ok && v != format {
				r.add(key, "%d is not known to this version, which reads format %d", v, format)
			}
		},
		"name": func(n *yaml.Node, key string) {
			d.Name = r.text(n, key)
			if d.Name != "" && !ValidName(d.Name) {
				r.add(key, "%q is not a name: %s", d.Name, nameRule)
			}
		},
		"subnet": func(n *yaml.Node, key string) { d.Subnet = r.prefix(n, key) },
		"uplink": func(n *yaml.Node, key string) { d.Uplink = r.prefix(n, key) },
		"dhcp":   func(n *yaml.Node, key string) { r.dhcp(n, key, &d.DHCP) },
		"vpn": func(n *yaml.Node, key string) {
			d.VPN = &VPN{}
			r.mapping(n, key, fields{
				"subnet": func(n *yaml.Node, key string) { d.VPN.Subnet = r.prefix(n, key) },
				"port": func(n *yaml.Node, key string) {
					if v, ok := r.number(n, key); ok && (v < 1 || v > 65535) {
						r.add(key, "%d is not a port: from 1 to 65535", v)
					} else if ok {
						d.VPN.Port = uint16(v)
					}
				},
				"endpoint": func(n *yaml.Node, key string) {
					if d.VPN.Endpoint = r.text(n, key); d.VPN.Endpoint != "" && !validEndpoint(d.VPN.Endpoint) {
						r.add(key, "%q is not where a hub can be reached: a name or an address, and :PORT if it is another one than the VPN's", d.VPN.Endpoint)
						d.VPN.Endpoint = ""
					}
				},
			})
		},
		"tailscale": func(n *yaml.Node, key string) { r.tailscale(n, key, d) },
		"dns":       func(n *yaml.Node, key string) { r.mapping(n, key, r.dnsFields(d)) },
		"machines": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) { d.Machines = append(d.Machines, r.machine(n, key)) })
		},
		"microvms": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) { d.MicroVMs = append(d.MicroVMs, r.microVM(n, key)) })
		},
	}
	r.mapping(root, "", known)
	if root.Kind == yaml.MappingNode && !r.has("format") {
		r.add("", "format is missing: begin with `format: %d`", format)
	}
}

func (r *reader) machine(n *yaml.Node, key string) Machine {
	var m Machine
	r.mapping(n, key, fields{
		"name":    func(n *yaml.Node, key string) { m.Name = r.text(n, key) },
		"address": func(n *yaml.Node, key string) { m.Address = r.address(n, key) },
		"roles": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) {
				role := map[string]*bool{"hub": &m.Hub, "host": &m.Host}[r.text(n, key)]
				switch {
				case role == nil:
					r.add(key, "%q is not a role: it must be hub or host", n.Value)
				case *role:
					r.add(key, "%s is there twice", n.Value)
				default:
					*role = true
				}
			})
		},
	})
	return m
}

func (r *reader) microVM(n *yaml.Node, key string) MicroVM {
	var m MicroVM
	text := func(to *string) func(*yaml.Node, string) {
		return func(n *yaml.Node, key string) { *to = r.text(n, key) }
	}
	size := func(to *int32) func(*yaml.Node, string) {
		return func(n *yaml.Node, key string) {
			text := r.text(n, key)
			if text == "" {
				return
			}
			var err error
			if *to, err = ParseMemory(text); err != nil {
				r.add(key, "%s: %v", text, err)
			}
		}
	}
	r.mapping(n, key, fields{
		"name": text(&m.Name), "namespace": text(&m.Namespace), "host": text(&m.Host), "image": text(&m.Image),
		"kernel": text(&m.Kernel), "driver": text(&m.Driver), "restart": text(&m.Restart),
		"address": func(n *yaml.Node, key string) {
			if a := r.address(n, key); a.IsValid() {
				m.Address = a.String()
			}
		},
		"cpus": func(n *yaml.Node, key string) {
			if v, ok := r.number(n, key); ok && v < 1 {
				r.add(key, "%d: a microVM needs one", v)
			} else if ok {
				m.CPUs = int32(min(v, 1<<30))
			}
		},
		"memory": size(&m.Memory), "disk": size(&m.Disk),
		"command": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) {
				r.scalar(n, key)
				m.Command = append(m.Command, n.Value)
			})
		},
		"env": func(n *yaml.Node, key string) { m.Env = r.texts(n, key) },
		"egress": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) {
				r.scalar(n, key)
				m.Egress = append(m.Egress, n.Value)
			})
			e, err := nat.ParseEgress(m.Egress)
			if err != nil {
				r.add(key, "%v", err)
			}
			m.Egress = e.Texts()
		},
		"ports": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) {
				r.scalar(n, key)
				p, err := nat.ParsePort(n.Value)
				if err != nil {
					r.add(key, "%v", err)
					return
				}
				m.Ports = append(m.Ports, p)
			})
		},
		"labels": func(n *yaml.Node, key string) { m.Labels = r.texts(n, key) },
		"allowed_addresses": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) {
				m.AllowedAddresses = append(m.AllowedAddresses, r.text(n, key))
			})
		},
		"spec": func(n *yaml.Node, key string) {
			if err := n.Decode(&m.Spec); err != nil || m.Spec == nil {
				r.add(key, "it must be a microVM as flintlock's API has it, without id and namespace")
			}
		},
	})
	return m
}

// mapping calls a function for each key, and objects to those that have none.
func (r *reader) mapping(n *yaml.Node, key string, known fields) {
	if n.Kind != yaml.MappingNode {
		r.lines[key] = n.Line
		r.add(key, "it must be keys and values, and is %s", kind(n))
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], resolved(n.Content[i+1])
		name := k.Value
		if key != "" {
			name = key + "." + name
		}
		read, ok := known[k.Value]
		switch {
		case !ok || k.Kind != yaml.ScalarNode:
			r.all = append(r.all, &Mistake{File: r.file, Line: k.Line, Key: key,
				Problem: fmt.Sprintf("there is no key %q, only %s", k.Value, strings.Join(slices.Sorted(maps.Keys(known)), ", "))})
		case r.has(name):
			r.all = append(r.all, &Mistake{File: r.file, Line: k.Line, Key: name, Problem: fmt.Sprintf("it is there already in line %d", r.lines[name])})
		case isNull(v):
			// Left out, as it were: what followed may be commented out.
		default:
			r.lines[name] = k.Line
			read(v, name)
		}
	}
}

func (r *reader) list(n *yaml.Node, key string, read func(n *yaml.Node, key string)) {
	if n.Kind != yaml.SequenceNode {
		r.add(key, "it must be a list, and is %s", kind(n))
		return
	}
	for i, item := range n.Content {
		item = resolved(item)
		k := fmt.Sprintf("%s[%d]", key, i)
		r.lines[k] = item.Line
		read(item, k)
	}
}

// texts reads keys and values of any name. All values are text: "true" and 1 too.
func (r *reader) texts(n *yaml.Node, key string) map[string]string {
	if n.Kind != yaml.MappingNode {
		r.add(key, "it must be keys and values, and is %s", kind(n))
		return nil
	}
	all := map[string]string{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], resolved(n.Content[i+1])
		name := key + "." + k.Value
		_, twice := all[k.Value]
		r.lines[name] = k.Line
		switch {
		case k.Kind != yaml.ScalarNode || k.Value == "" || strings.ContainsAny(k.Value, "=\x00"):
			r.add(name, "%q can't be a key", k.Value)
		case twice:
			r.add(name, "it is there twice")
		case v.Kind != yaml.ScalarNode:
			r.add(name, "it must be a text, and is %s", kind(v))
		case isNull(v):
			all[k.Value] = ""
		default:
			all[k.Value] = v.Value
		}
	}
	return all
}

func (r *reader) scalar(n *yaml.Node, key string) bool {
	if n.Kind != yaml.ScalarNode {
		r.add(key, "it must be a text, and is %s", kind(n))
		return false
	}
	return true
}

func (r *reader) text(n *yaml.Node, key string) string {
	if !r.scalar(n, key) {
		return ""
	}
	if n.Value == "" {
		r.add(key, "it is empty")
	}
	return n.Value
}

func (r *reader) number(n *yaml.Node, key string) (int64, bool) {
	v, err := strconv.ParseInt(n.Value, 10, 64)
	if n.Kind != yaml.ScalarNode || err != nil {
		r.add(key, "it must be a number, and is %s", kind(n))
		return 0, false
	}
	return v, true
}

func (r *reader) address(n *yaml.Node, key string) netip.Addr {
	text := r.text(n, key)
	a, err := netip.ParseAddr(text)
	if text != "" && (err != nil || !a.Is4()) {
		r.add(key, "%q is not an IPv4 address", text)
	}
	if !a.Is4() {
		return netip.Addr{}
	}
	return a
}

func (r *reader) prefix(n *yaml.Node, key string) netip.Prefix {
	text := r.text(n, key)
	if text == "" {
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || !p.Addr().Is4():
		r.add(key, "%q is not an IPv4 subnet, such as 192.168.10.0/25", text)
	case p != p.Masked():
		r.add(key, "%s is an address in a subnet: write %s", p, p.Masked())
	default:
		return p
	}
	return netip.Prefix{}
}

// resolved is what an alias (*name) stands for. None leads to another: the
// depth of what is read is that of the file's form, whatever it refers to.
func resolved(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		return n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// longestValue is how much of a value is told: the file may be another one than
// was meant, and have secrets in it.
const longestValue = 30

func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "keys and values"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		if len(n.Value) > longestValue {
			return strconv.Quote(n.Value[:longestValue] + "…")
		}
		return strconv.Quote(n.Value)
	}
	return "something else"
}
