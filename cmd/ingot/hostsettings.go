package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"
	"github.com/spf13/pflag"
)

// setting is a key of the configuration that is a flag and a variable too.
type setting struct {
	key, short string
	value      any // by default, in the type that it has
	usage      string
	vain       bool // flintlock's; usage says why it has no effect
}

// settingGroup has a title in the help.
type settingGroup struct {
	title    string
	settings []setting
}

// hostSettings are all of them, flintlock's by flintlock's names.
func hostSettings() []settingGroup {
	c := defaultHostConfig()
	return []settingGroup{
		{"Services", []setting{
			{key: "grpc-endpoint", value: c.GRPCEndpoint, usage: "where gRPC is served"},
			{key: "insecure-endpoint", value: c.InsecureEndpoint, usage: "where flintlock's services are served in plaintext as well, for clients without TLS"},
			{key: "advertise-address", value: c.AdvertiseAddress, usage: "where clients reach gRPC (default: where they came)"},
			{key: "enable-http", value: c.EnableHTTP, usage: "serve microVMs over HTTP too"},
			{key: "http-endpoint", value: c.HTTPEndpoint, usage: "where that is"},
			{key: "enable-exec-api", value: c.EnableExec, usage: "serve commands in guests"},
			{key: "enable-ssh-proxy-api", value: c.EnableSSHProxy, usage: "serve ssh to guests"},
			{key: "debug-endpoint", value: c.DebugEndpoint, usage: "where profiles and metrics are served, to anybody (default: nowhere)"},
		}},
		{"Who may call", []setting{
			{key: "basic-auth-token", value: c.BasicAuthToken, usage: "token that clients must have (default: none)"},
			{key: "insecure", value: c.Insecure, usage: "serve in plaintext"},
			{key: "tls-cert", value: c.TLSCert, usage: "certificate; it is read again when it changes"},
			{key: "tls-key", value: c.TLSKey, usage: "its key"},
			{key: "tls-client-validate", value: c.TLSClientCheck, usage: "want a certificate of clients"},
			{key: "tls-client-ca", value: c.TLSClientCA, usage: "CA of clients' certificates"},
			{key: "authz-mode", value: c.AuthzMode, usage: "off or audit, which are the same: who has a certificate or the token may do all, and the log has who did what"},
		}},
		{"MicroVMs", []setting{
			{key: "state-dir", value: c.StateDir, usage: "where they are recorded, and write their logs"},
			{key: "bridge-name", value: c.BridgeName, usage: "bridge that taps are joined to"},
			{key: "parent-iface", value: c.ParentInterface, usage: "interface that macvtaps sit on"},
			{key: "default-provider", value: c.DefaultProvider, usage: "hypervisor of those that ask for none (default: the one that is there)"},
			{key: "deleteMicroVM-timeout", value: c.DeletePatience, usage: "how long a guest may take to shut down before it is deleted; 0: it is not asked to"},
			{key: "maximum-retry", value: c.MaximumRetry, usage: "how often one that cannot be started is tried again; 0: until it can"},
		}},
		{"Images", []setting{
			{key: "containerd-socket", value: c.Containerd, usage: "containerd's socket"},
			{key: "containerd-ns", value: c.ContainerdNS, usage: "namespace in it, of this daemon alone"},
			{key: "pool", value: c.Pool, usage: "where containerd has its pool of volumes"},
		}},
		{"Log", []setting{
			{key: "verbosity", short: "v", value: c.Verbosity, usage: "2 for the steps of each microVM, 9 for all there is"},
			{key: "log-format", value: string(c.LogFormat), usage: "text or json"},
			{key: "log-output", value: c.LogOutput, usage: "stderr, stdout or a file"},
		}},
		{"Of flintlock's, without effect", []setting{
			{key: "containerd-kernel-ss", value: "native", usage: "kernels are files of native snapshots", vain: true},
			{key: "firecracker-bin", value: "firecracker", usage: "the hypervisor is another", vain: true},
			{key: "firecracker-detach", value: true, usage: "hypervisors outlive the daemon", vain: true},
			{key: "cloudhypervisor-bin", value: "cloud-hypervisor-static", usage: "the hypervisor is another", vain: true},
			{key: "cloudhypervisor-detach", value: true, usage: "hypervisors outlive the daemon", vain: true},
			{key: "virtiofs-bin", value: "/usr/libexec/virtiofsd", usage: "there is no virtiofs", vain: true},
			{key: "resync-period", value: 10 * time.Minute, usage: "what ends is noticed when it does", vain: true},
			{key: "socket-dir", value: "/run/flintlock", usage: "sockets are beside a microVM's other files", vain: true},
			{key: "disable-reconcile", value: false, usage: "it was for tests", vain: true},
			{key: "disable-api", value: false, usage: "it was for tests", vain: true},
			{key: "repository-store", value: "containerd", usage: "records are in state-dir", vain: true},
			{key: "sqlite-data-path", value: "", usage: "records are in state-dir", vain: true},
			{key: "trust-domain", value: "", usage: "who has a certificate or the token may do all", vain: true},
			{key: "host-id", value: "", usage: "who has a certificate or the token may do all", vain: true},
			{key: "authz-policy", value: "", usage: "who has a certificate or the token may do all", vain: true},
		}},
	}
}

// settingOf finds a setting by its key.
func settingOf(key string) (setting, bool) {
	for _, g := range hostSettings() {
		for _, s := range g.settings {
			if s.key == key {
				return s, true
			}
		}
	}
	return setting{}, false
}

func (s setting) add(flags *pflag.FlagSet) {
	switch value := s.value.(type) {
	case string:
		flags.StringP(s.key, s.short, value, s.usage)
	case bool:
		flags.BoolP(s.key, s.short, value, s.usage)
	case int:
		flags.IntP(s.key, s.short, value, s.usage)
	case time.Duration:
		flags.DurationP(s.key, s.short, value, s.usage)
	}
}

// parseHostFlags reads the command line. A flag that nobody knows may be one of a
// flintlock that is to come, or was: it is left out, and said, unless it is nearly one
// that is known. Then somebody has mistyped it.
func parseHostFlags(flags *pflag.FlagSet, args []string) (unknown []string, err error) {
	var known []string
	for i := 0; i < len(args); i++ {
		name, isLong := strings.CutPrefix(args[i], "--")
		name, _, hasValue := strings.Cut(name, "=")
		switch {
		case args[i] == "--":
			known = append(known, args[i:]...)
			i = len(args)
			continue
		case !isLong || flags.Lookup(name) != nil:
			known = append(known, args[i])
			if f := flags.Lookup(name); isLong && !hasValue && f.NoOptDefVal == "" && i+1 < len(args) {
				i++
				known = append(known, args[i]) // its value, whatever that looks like
			}
			continue
		}
		if like := nearest(name, flagNames(flags)); like != "" {
			return nil, fmt.Errorf("unknown flag: --%s (did you mean --%s?)", name, like)
		}
		unknown = append(unknown, "--"+name)
		if !hasValue && i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
			i++
		}
	}
	return unknown, flags.Parse(known)
}

func flagNames(flags *pflag.FlagSet) (names []string) {
	flags.VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	return names
}

// nearest is the one of names that differs from a word by a slip of the fingers.
func nearest(word string, names []string) string {
	for _, n := range names {
		if distance(word, n) <= min(2, len(word)/3) {
			return n
		}
	}
	return ""
}

// distance is how many letters are to be put in, taken out or changed (Levenshtein's).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

const variablePrefix = "FLINTLOCKD_"

// setFromEnvironment sets flags that were not given from variables: FLINTLOCKD_STATE-DIR,
// as flintlock has it, or FLINTLOCKD_STATE_DIR, which a shell can set too.
func (c *hostConfig) setFromEnvironment(flags *pflag.FlagSet, environ []string) error {
	var errs []error
	spell := func(s string) string { return strings.ToLower(strings.ReplaceAll(s, "_", "-")) }
	keys := map[string]string{}
	for _, g := range hostSettings() {
		for _, s := range g.settings {
			keys[spell(s.key)] = s.key
		}
	}
	from := map[string]string{}
	for _, e := range slices.Sorted(slices.Values(environ)) {
		variable, value, _ := strings.Cut(e, "=")
		name, ok := strings.CutPrefix(variable, variablePrefix)
		if !ok {
			continue
		}
		key, ok := keys[spell(name)]
		if !ok {
			c.remark("unknown variable", "name", variable)
			continue
		}
		flag := flags.Lookup(key)
		if first := from[key]; first != "" && flag.Value.String() != value {
			errs = append(errs, fmt.Errorf("%s and %s differ: %w", first, variable, errdefs.ErrInvalidArgument))
		}
		if flag.Changed {
			continue
		}
		from[key] = variable
		if err := flags.Set(key, value); err != nil {
			errs = append(errs, fmt.Errorf("%s=%s: %w", variable, value, errdefs.ErrInvalidArgument))
		}
	}
	return errors.Join(errs...)
}

// override sets what flags say instead of the file.
func (c *hostConfig) override(flags *pflag.FlagSet) error {
	var errs []error
	flags.Visit(func(f *pflag.Flag) {
		s, ok := settingOf(f.Name)
		if !ok {
			return
		}
		if s.vain {
			c.ignore(s)
			return
		}
		value := f.Value.String()
		if _, ok := s.value.(string); ok {
			value = strconv.Quote(value)
		}
		if yaml.UnmarshalWithOptions([]byte(f.Name+": "+value+"\n"), c, yaml.Strict()) != nil {
			errs = append(errs, fmt.Errorf("--%s %s: %w", f.Name, f.Value, errdefs.ErrInvalidArgument))
		}
	})
	return errors.Join(errs...)
}

// ignore says, once, that a setting has no effect.
func (c *hostConfig) ignore(s setting) {
	for _, r := range c.remarks {
		if slices.Contains(r.args, any(s.key)) {
			return
		}
	}
	c.remark("a setting has no effect", "setting", s.key, "why", s.usage)
}
