package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/spf13/pflag"

	"ingot/internal/env"
	"ingot/internal/image"
	"ingot/internal/logline"
	"ingot/internal/pki"
	"ingot/internal/vm"
)

// hostConfig is the host's configuration. Its keys are flintlock's, and ours below
// them. What is a flag, and in the environment, is in hostSettings.
type hostConfig struct {
	GRPCEndpoint    string         `yaml:"grpc-endpoint"`
	BasicAuthToken  string         `yaml:"basic-auth-token"`
	Insecure        bool           `yaml:"insecure"`
	TLSCert         string         `yaml:"tls-cert"`
	TLSKey          string         `yaml:"tls-key"`
	TLSClientCheck  bool           `yaml:"tls-client-validate"`
	TLSClientCA     string         `yaml:"tls-client-ca"`
	Containerd      string         `yaml:"containerd-socket"`
	ContainerdNS    string         `yaml:"containerd-ns"`
	BridgeName      string         `yaml:"bridge-name"`
	ParentInterface string         `yaml:"parent-iface"`
	StateDir        string         `yaml:"state-dir"`
	DefaultProvider string         `yaml:"default-provider"`
	DeletePatience  time.Duration  `yaml:"deleteMicroVM-timeout"`
	MaximumRetry    int            `yaml:"maximum-retry"`
	Verbosity       int            `yaml:"verbosity"`
	LogFormat       logline.Format `yaml:"log-format"`
	LogOutput       string         `yaml:"log-output"`
	DebugEndpoint   string         `yaml:"debug-endpoint"`
	EnableHTTP      bool           `yaml:"enable-http"`
	HTTPEndpoint    string         `yaml:"http-endpoint"`
	EnableExec      bool           `yaml:"enable-exec-api"`
	EnableSSHProxy  bool           `yaml:"enable-ssh-proxy-api"`
	AuthzMode       string         `yaml:"authz-mode"`

	// InsecureEndpoint is where flintlock's services alone are served in plaintext.
	InsecureEndpoint string `yaml:"insecure-endpoint"`
	// AdvertiseAddress is where clients reach gRPC, if not where they came; the port
	// may be left out.
	AdvertiseAddress string `yaml:"advertise-address"`
	TokenFile        string `yaml:"token-file"`
	DefaultRegistry  string `yaml:"default-registry"` // what short image names mean
	RegistryCA       string `yaml:"registry-ca"`
	// RegistryAuth is in the form of docker's config.json, read at each pull.
	RegistryAuth string `yaml:"registry-auth"`
	// ImageKeep is how long an image stays that no microVM uses; 0: for ever.
	ImageKeep time.Duration `yaml:"image-keep"`
	// How much of the machine is promised to microVMs at most; 0: no limit.
	MaxMicroVMs      int     `yaml:"max-microvms"`
	VCPUOvercommit   float64 `yaml:"vcpu-overcommit"`   // guests' CPUs to one of the machine's
	MemoryOvercommit float64 `yaml:"memory-overcommit"` // guests' memory to the machine's, without what is reserved
	ReservedMemory   vm.MiB  `yaml:"reserved-memory"`   // for the machine itself

	Pool        string       `yaml:"pool"`         // where containerd's volumes live
	Machines    []netip.Addr `yaml:"machines"`     // of the environment: guests are kept from them
	Hub         netip.Addr   `yaml:"hub"`          // the one of them that gives names, addresses and images
	Trusted     netip.Prefix `yaml:"trusted"`      // who reaches gRPC beside the machines
	VPN         netip.Prefix `yaml:"vpn"`          // peers of the hub's VPN, who do so too
	Segment     string       `yaml:"segment"`      // the segment's interface
	SegmentPort string       `yaml:"segment-port"` // its other end on the bridge, in a lab

	// MetricsEndpoint is where /metrics is served, in plaintext and to whoever reaches it;
	// empty: nowhere. Where there is a segment, the machines, Trusted and VPN reach it.
	MetricsEndpoint string `yaml:"metrics-endpoint"`

	file    string   // where it was read
	remarks []remark // what is to be said once there is a log
}

func defaultHostConfig() hostConfig {
	return hostConfig{
		GRPCEndpoint: "localhost:9090", HTTPEndpoint: "localhost:8090", Containerd: "/run/containerd/containerd.sock", ContainerdNS: image.DefaultNamespace,
		StateDir: "/var/lib/flintlock", Pool: "/var/lib/containerd",
		RegistryAuth: "/etc/ingot/registry-auth.json", ImageKeep: image.DefaultUnused,
		LogFormat: logline.Text, LogOutput: "stderr", AuthzMode: "off",
		// An idle guest takes no CPU, but keeps its memory.
		VCPUOvercommit: 64, MemoryOvercommit: 1, ReservedMemory: 512,
	}
}

// remark is a warning.
type remark struct {
	text string
	args []any
}

func (c *hostConfig) remark(text string, args ...any) {
	c.remarks = append(c.remarks, remark{text, args})
}

// hostConfigFiles are where a configuration is looked for: the first that is there
// counts.
func hostConfigFiles() []string {
	dirs := []string{"/etc/opt/flintlockd"}
	if dir := os.Getenv("XDG_CONFIG_HOME"); dir != "" {
		dirs = append(dirs, filepath.Join(dir, "flintlockd"))
	} else if home := os.Getenv("HOME"); home != "" {
		dirs = append(dirs, filepath.Join(home, ".config", "flintlockd"))
	}
	var files []string
	for _, dir := range dirs {
		files = append(files, filepath.Join(dir, "config.yaml"), filepath.Join(dir, "config.yml"))
	}
	return files
}

// readHostConfig reads the file, or the first of the usual ones if none is named, and
// what flags and then variables say instead.
func readHostConfig(file string, flags *pflag.FlagSet, environ []string) (hostConfig, error) {
	c := defaultHostConfig()
	files := []string{file}
	if file == "" {
		files = hostConfigFiles()
	}
	c.file = files[0]
	for _, path := range files {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && file == "" {
			continue
		}
		if err != nil {
			return c, fmt.Errorf("read configuration: %w", err)
		}
		if err := c.read(path, b); err != nil {
			return c, err
		}
		c.file = path
		break
	}
	if err := errors.Join(c.setFromEnvironment(flags, environ), c.override(flags)); err != nil {
		return c, err
	}
	return c, c.check()
}

// read takes a file. What flintlock knows and has no effect is said; what nobody knows is
// a mistake, and all of them are told.
func (c *hostConfig) read(path string, b []byte) error {
	wrong := func(err error) error { return fmt.Errorf("read %s: %w", path, err) }
	parsed, err := parser.ParseBytes(b, 0)
	if err != nil {
		return wrong(err)
	}
	if len(parsed.Docs) == 0 || parsed.Docs[0].Body == nil {
		return nil
	}
	mapping, ok := parsed.Docs[0].Body.(*ast.MappingNode)
	if !ok {
		return wrong(yaml.UnmarshalWithOptions(b, c, yaml.Strict())) // which says what it is
	}
	keys := map[string]bool{}
	for f := range reflect.TypeFor[hostConfig]().Fields() {
		if key := f.Tag.Get("yaml"); key != "" {
			keys[key] = true
		}
	}
	var errs []error
	mapping.Values = slices.DeleteFunc(mapping.Values, func(v *ast.MappingValueNode) bool {
		key := v.Key.GetToken().Value
		s, ok := settingOf(key)
		switch {
		case keys[key]:
			return false
		case ok:
			c.ignore(s)
		default:
			hint := ""
			if like := nearest(key, slices.Sorted(maps.Keys(keys))); like != "" {
				hint = fmt.Sprintf(" (did you mean %s?)", like)
			}
			errs = append(errs, &env.Mistake{File: path, Line: v.Key.GetToken().Position.Line, Key: key, Problem: "there is no such setting" + hint})
		}
		return true
	})
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := yaml.NodeToValue(mapping, c, yaml.Strict()); err != nil {
		return wrong(err)
	}
	return nil
}

// check looks for what can't be, and reads the token.
func (c *hostConfig) check() error {
	if c.BridgeName == "" && c.ParentInterface == "" {
		return errors.New("you must supply at least one of parent interface, bridge name (parent-iface, bridge-name in " + c.file + ")")
	}
	for key, n := range map[string]float64{
		"max-microvms": float64(c.MaxMicroVMs), "vcpu-overcommit": c.VCPUOvercommit,
		"memory-overcommit": c.MemoryOvercommit, "reserved-memory": float64(c.ReservedMemory),
	} {
		if !(n >= 0 && n <= math.MaxInt32) { // nor NaN
			return fmt.Errorf("read %s: %s: %v is out of range", c.file, key, n)
		}
	}
	for key, addr := range map[string]netip.Addr{"hub": c.Hub, "trusted": c.Trusted.Addr(), "vpn": c.VPN.Addr()} {
		if addr.IsValid() && !addr.Is4() {
			return fmt.Errorf("read %s: %s: %s is no IPv4 address", c.file, key, addr)
		}
	}
	for _, addr := range c.Machines {
		if !addr.Is4() {
			return fmt.Errorf("read %s: machines: %s is no IPv4 address", c.file, addr)
		}
	}
	if !slices.Contains(logline.Formats, c.LogFormat) {
		return fmt.Errorf("log-format: %q is neither text nor json: %w", c.LogFormat, errdefs.ErrInvalidArgument)
	}
	switch c.AuthzMode {
	case "off":
	case "audit":
		c.remark("no policy judges calls: who has a certificate or the token may do all, and the log has who did what", "setting", "authz-mode")
	default: // who asks for more must not believe that there is more
		return fmt.Errorf("authz-mode: %q: no policy judges calls: who has a certificate or the token may do all; only off and audit can be had: %w", c.AuthzMode, errdefs.ErrInvalidArgument)
	}
	if c.DeletePatience < 0 || c.MaximumRetry < 0 {
		return fmt.Errorf("deleteMicroVM-timeout and maximum-retry cannot be negative: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := c.ports(); err != nil {
		return err
	}
	if c.TokenFile != "" {
		token, err := pki.ReadToken(c.TokenFile)
		if err != nil {
			return err
		}
		c.BasicAuthToken = string(token)
	}
	return nil
}

// ports are those of the host's own services.
func (c hostConfig) ports() (ports []uint16, err error) {
	endpoints := [][2]string{{"grpc-endpoint", c.GRPCEndpoint}}
	if c.EnableHTTP {
		endpoints = append(endpoints, [2]string{"http-endpoint", c.HTTPEndpoint})
	}
	for _, e := range [][2]string{{"insecure-endpoint", c.InsecureEndpoint}, {"debug-endpoint", c.DebugEndpoint}, {"metrics-endpoint", c.MetricsEndpoint}} {
		if e[1] != "" {
			endpoints = append(endpoints, e)
		}
	}
	for _, e := range endpoints {
		_, port, err := net.SplitHostPort(e[1])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e[0], err)
		}
		number, err := net.LookupPort("tcp", port)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e[0], err)
		}
		ports = append(ports, uint16(number))
	}
	return ports, nil
}

// credentials are those of gRPC, or none if it is in plaintext.
func (c hostConfig) credentials(log *slog.Logger) (*pki.Credentials, error) {
	if c.Insecure {
		if cmp.Or(c.TLSCert, c.TLSKey) != "" {
			return nil, errors.New("insecure: there is a certificate as well: choose one")
		}
		return nil, nil
	}
	if c.TLSCert == "" || c.TLSKey == "" {
		return nil, errors.New("tls-cert and tls-key are required, unless insecure is true")
	}
	f := pki.Files{Cert: c.TLSCert, Key: c.TLSKey}
	if c.TLSClientCheck {
		if c.TLSClientCA == "" {
			return nil, errors.New("tls-client-ca is required with tls-client-validate")
		}
		f.CA = c.TLSClientCA
	}
	return f.Open(log)
}

// log opens the log.
func (c hostConfig) log() (*slog.Logger, error) {
	level := slog.LevelInfo
	switch {
	case c.Verbosity >= 9:
		level = logline.Trace
	case c.Verbosity >= 2:
		level = slog.LevelDebug
	}
	out := os.Stderr
	switch c.LogOutput {
	case "stderr":
	case "stdout":
		out = os.Stdout
	default:
		var err error
		if out, err = os.OpenFile(c.LogOutput, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640); err != nil {
			return nil, fmt.Errorf("open log: %w", err)
		}
	}
	return logline.New(out, c.LogFormat, level), nil
}
