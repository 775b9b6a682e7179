package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// What the host's rules, which are IPv4's, can't be made of.
func TestHostConfigWantsIPv4(t *testing.T) {
	for text, want := range map[string]string{
		"hub: 192.168.10.2\ntrusted: 100.64.0.0/30\nmachines: [192.168.10.3]": "",
		"hub: fd00::2":         "hub: fd00::2 is no IPv4 address",
		"trusted: fd00::/64":   "trusted: fd00:: is no IPv4 address",
		"machines: [fd00::10]": "machines: fd00::10 is no IPv4 address",
	} {
		path := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(path, []byte("bridge-name: br0\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := readHostConfig(path, hostCommand().Flags(), nil)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// A token file that is named and empty must not mean that no token is asked for.
func TestHostWantsTheTokenThatIsNamed(t *testing.T) {
	dir := t.TempDir()
	token, config := filepath.Join(dir, "token"), filepath.Join(dir, "config.yaml")
	for path, text := range map[string]string{token: "\n", config: "bridge-name: br0\ntoken-file: " + token + "\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := readHostConfig(config, hostCommand().Flags(), nil); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Errorf("got %v", err)
	}
}

// write writes a configuration file.
func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestOrderOfSettings: a flag counts before a variable, that before the file, that before
// the default; in both spellings.
func TestOrderOfSettings(t *testing.T) {
	path := write(t, t.TempDir()+"/config.yaml", "bridge-name: br0\ngrpc-endpoint: 10.0.0.1:9090\nstate-dir: /there\nverbosity: 2\n")
	flags := hostCommand().Flags()
	unknown, err := parseHostFlags(flags, []string{"--grpc-endpoint", "0.0.0.0:9090", "--parent-iface=eth0", "--insecure", "--containerd-ns", "123", "-v", "9", "--resync-period", "1m"})
	if err != nil || unknown != nil {
		t.Fatal(unknown, err)
	}
	c, err := readHostConfig(path, flags, []string{
		"PATH=/bin", "FLINTLOCKD_GRPC-ENDPOINT=1.2.3.4:1", "FLINTLOCKD_STATE-DIR=/env", "FLINTLOCKD_LOG_FORMAT=json",
		"FLINTLOCKD_DELETEMICROVM_TIMEOUT=7s", "FLINTLOCKD_CONTAINERD_NS=x", "FLINTLOCKD_TLS-CLIENT-VALIDATE=1",
		"FLINTLOCKD_MAXIMUM_RETRY=4", "FLINTLOCKD_MAXIMUM-RETRY=4", "FLINTLOCKD_WHATEVER=1", "FLINTLOCKD_RESYNC_PERIOD=2m",
	})
	want := defaultHostConfig()
	want.BridgeName, want.GRPCEndpoint, want.StateDir, want.ParentInterface, want.Insecure, want.ContainerdNS, want.Verbosity =
		"br0", "0.0.0.0:9090", "/env", "eth0", true, "123", 9
	want.LogFormat, want.DeletePatience, want.TLSClientCheck, want.MaximumRetry, want.file = "json", 7*time.Second, true, 4, path
	want.remarks = []remark{
		{"unknown variable", []any{"name", "FLINTLOCKD_WHATEVER"}},
		{"a setting has no effect", []any{"setting", "resync-period", "why", "what ends is noticed when it does"}},
	}
	if err != nil || !reflect.DeepEqual(c, want) {
		t.Errorf("%v\n got %+v\nwant %+v", err, c, want)
	}
}

func TestBadVariables(t *testing.T) {
	path := write(t, t.TempDir()+"/config.yaml", "bridge-name: br0\n")
	for variables, want := range map[string]string{
		"FLINTLOCKD_INSECURE=maybe":                        "FLINTLOCKD_INSECURE=maybe: ",
		"FLINTLOCKD_RESYNC-PERIOD=often":                   "FLINTLOCKD_RESYNC-PERIOD=often: ",
		"FLINTLOCKD_STATE-DIR=/a FLINTLOCKD_STATE_DIR=/b":  "FLINTLOCKD_STATE-DIR and FLINTLOCKD_STATE_DIR differ",
		"FLINTLOCKD_LOG_FORMAT=xml":                        `"xml" is neither text nor json`,
		"FLINTLOCKD_GRPC_ENDPOINT=here":                    "grpc-endpoint: address here: missing port",
		"FLINTLOCKD_INSECURE_ENDPOINT=:99999":              "insecure-endpoint: ",
		"FLINTLOCKD_DELETEMICROVM-TIMEOUT=-1s":             "cannot be negative",
		"FLINTLOCKD_AUTHZ_MODE=enforce":                    "no policy judges calls",
		"FLINTLOCKD_AUTHZ_MODE=off":                        "",
		"FLINTLOCKD_STATE-DIR=/a FLINTLOCKD_STATE_DIR=/a ": "",
	} {
		_, err := readHostConfig(path, hostCommand().Flags(), strings.Fields(variables))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", variables, err, want)
		}
	}
}

// flintlockFlags are those of flintlock's daemon, which stand in people's unit files,
// with values that they take.
const flintlockFlags = `--grpc-endpoint 0.0.0.0:9090 --http-endpoint 0.0.0.0:8090 --enable-http --basic-auth-token secret --insecure
--tls-cert c --tls-key k --tls-client-validate --tls-client-ca a --containerd-socket /run/containerd-dev/containerd.sock
--containerd-ns flintlock --containerd-kernel-ss native --firecracker-bin /usr/local/bin/firecracker --firecracker-detach=true
--cloudhypervisor-bin ch --cloudhypervisor-detach=false --virtiofs-bin v --default-provider firecracker --bridge-name br0
--parent-iface bond0.1000 --state-dir /var/lib/flintlock --resync-period 10m0s --deleteMicroVM-timeout 10s
--debug-endpoint localhost:6060 --disable-reconcile --disable-api --maximum-retry 10 -v 9 --log-format json --log-output stdout
--enable-exec-api --enable-ssh-proxy-api --socket-dir /run/flintlock --repository-store sqlite --sqlite-data-path /x
--trust-domain t --host-id h --authz-mode audit --authz-policy p`

// TestFlintlockFlags: each is known, as a flag and in the file, and what has no effect
// is said once, however often it is set.
func TestFlintlockFlags(t *testing.T) {
	flags := hostCommand().Flags()
	args := strings.Fields(flintlockFlags)
	if unknown, err := parseHostFlags(flags, args); err != nil || unknown != nil || flags.NArg() > 0 {
		t.Fatal(unknown, err, flags.Args())
	}
	vain := map[string]bool{}
	text := ""
	flags.Visit(func(f *pflag.Flag) {
		s, ok := settingOf(f.Name)
		if !ok {
			t.Errorf("--%s is no setting", f.Name)
		}
		if s.vain || s.key == "authz-mode" { // audit is what there is always
			vain[s.key] = true
		}
		text += f.Name + ": " + f.Value.String() + "\n"
	})
	path := write(t, t.TempDir()+"/config.yaml", text)
	for what, given := range map[string]*pflag.FlagSet{"file": hostCommand().Flags(), "both": flags} {
		c, err := readHostConfig(path, given, nil)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		said := map[string]bool{}
		for _, r := range c.remarks {
			said[r.args[1].(string)] = true
		}
		if !reflect.DeepEqual(said, vain) || len(c.remarks) != len(vain) {
			t.Errorf("%s: said of %v, want %v", what, c.remarks, vain)
		}
		if c.Verbosity != 9 || c.DeletePatience != 10*time.Second || c.LogOutput != "stdout" || c.BridgeName != "br0" || !c.TLSClientCheck {
			t.Errorf("%s: %+v", what, c)
		}
	}
}

// Each key of the file is a flag too, which --help tells of, or the page has it.
func TestKeysAreDescribed(t *testing.T) {
	page, err := os.ReadFile("../../docs/flintlock.md")
	if err != nil {
		t.Fatal(err)
	}
	for f := range reflect.TypeFor[hostConfig]().Fields() {
		key, ok := f.Tag.Lookup("yaml")
		if !ok {
			continue
		}
		if s, isFlag := settingOf(key); !(isFlag && s.usage != "") && !strings.Contains(string(page), "`"+key+"`") {
			t.Errorf("%s is nowhere described", key)
		}
	}
}

func TestUnknownFlags(t *testing.T) {
	for line, want := range map[string]string{
		"--no-such-flag":                            "[--no-such-flag] []",
		"--no-such-flag value --insecure":           "[--no-such-flag] [insecure]",
		"--no-such-flag=a --other b --state-dir -x": "[--no-such-flag --other] [state-dir]",
		"--no-such-flag -v 2":                       "[--no-such-flag] [verbosity]",
		"--insecure --no-such-flag -- x":            "[--no-such-flag] [insecure]",
		"--grpc-endpiont x":                         "unknown flag: --grpc-endpiont (did you mean --grpc-endpoint?)",
		"--insecur":                                 "unknown flag: --insecur (did you mean --insecure?)",
		"--bridge_name x":                           "unknown flag: --bridge_name (did you mean --bridge-name?)",
		"-x":                                        "unknown shorthand flag",
		"--state-dir":                               "flag needs an argument: --state-dir",
		"--insecure=maybe":                          `invalid argument "maybe" for "--insecure"`,
		"--verbosity much":                          `invalid argument "much" for "-v, --verbosity"`,
	} {
		flags := hostCommand().Flags()
		unknown, err := parseHostFlags(flags, strings.Fields(line))
		set := []string{}
		flags.Visit(func(f *pflag.Flag) { set = append(set, f.Name) })
		got := fmt.Sprint(unknown, " ", set)
		if err != nil {
			got = err.Error()
		}
		if got != want && !(err != nil && strings.Contains(got, want)) {
			t.Errorf("%s: %s, want %s", line, got, want)
		}
	}
}

// TestMistakesInTheFile: each is told, with its line.
func TestMistakesInTheFile(t *testing.T) {
	path := write(t, t.TempDir()+"/config.yaml", "bridge-name: br0\nresync-period: 10m\ngrpc-endpont: x\nmore: 1\n")
	_, err := readHostConfig(path, hostCommand().Flags(), nil)
	want := path + ":3: grpc-endpont: there is no such setting (did you mean grpc-endpoint?)\n" + path + ":4: more: there is no such setting"
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	for text, want := range map[string]string{"- a": "config.yaml: ", "bridge-name: [": "config.yaml: ", "verbosity: much": "config.yaml: ", "bridge-name: a\nbridge-name: b": "config.yaml: "} {
		if _, err := readHostConfig(write(t, path, text), hostCommand().Flags(), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"", "\n", "# nothing\n", "---\n"} {
		if _, err := readHostConfig(write(t, path, text), hostCommand().Flags(), []string{"FLINTLOCKD_BRIDGE_NAME=br0"}); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestConfigurationIsFound in the places where flintlock looks, in their order, on a
// machine that has none at first.
func TestConfigurationIsFound(t *testing.T) {
	if !onMachine(t) {
		return
	}
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("tmpfs", "/etc/opt", "tmpfs", 0, ""),
	); err != nil {
		t.Fatal(err)
	}
	home, xdg := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", "")
	want := []string{"/etc/opt/flintlockd/config.yaml", "/etc/opt/flintlockd/config.yml", home + "/.config/flintlockd/config.yaml", home + "/.config/flintlockd/config.yml"}
	if got := hostConfigFiles(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q", got)
	}
	t.Setenv("XDG_CONFIG_HOME", xdg)
	want = append(want[:2:2], xdg+"/flintlockd/config.yaml", xdg+"/flintlockd/config.yml")
	if got := hostConfigFiles(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q", got)
	}
	if _, err := readHostConfig("", hostCommand().Flags(), nil); err == nil || !strings.Contains(err.Error(), "/etc/opt/flintlockd/config.yaml") {
		t.Errorf("none is there: %v", err)
	}
	write(t, xdg+"/flintlockd/config.yml", "bridge-name: yml\n")
	c, err := readHostConfig("", hostCommand().Flags(), nil)
	if err != nil || c.BridgeName != "yml" || c.file != xdg+"/flintlockd/config.yml" {
		t.Errorf("%v, %+v", err, c)
	}
	write(t, xdg+"/flintlockd/config.yaml", "bridge-name: yaml\n")
	if c, err := readHostConfig("", hostCommand().Flags(), nil); err != nil || c.BridgeName != "yaml" {
		t.Errorf("%v, %+v", err, c)
	}
	if _, err := readHostConfig(xdg+"/nothing", hostCommand().Flags(), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("one that is named and not there: %v", err)
	}
}
