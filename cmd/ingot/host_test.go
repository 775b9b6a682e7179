package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"
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
		_, err := readHostConfig(path, true, pflag.NewFlagSet("", pflag.ContinueOnError))
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
	if _, err := readHostConfig(config, true, hostCommand().Flags()); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Errorf("got %v", err)
	}
}

// TestFlagsOverrideTheFile has what stands in people's unit files.
func TestFlagsOverrideTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte("bridge-name: br0\ngrpc-endpoint: 10.0.0.1:9090\nstate-dir: /there\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := hostCommand().Flags()
	if err := flags.Parse([]string{"--grpc-endpoint", "0.0.0.0:9090", "--parent-iface=eth0", "--insecure", "--containerd-ns", "123", "-v", "9", "--resync-period", "1m"}); err != nil {
		t.Fatal(err)
	}
	c, err := readHostConfig(path, true, flags)
	want := defaultHostConfig()
	want.BridgeName, want.GRPCEndpoint, want.StateDir, want.ParentInterface, want.Insecure, want.ContainerdNS, want.Verbosity =
		"br0", "0.0.0.0:9090", "/there", "eth0", true, "123", 9
	if err != nil || !reflect.DeepEqual(c, want) {
		t.Errorf("%v\n got %+v\nwant %+v", err, c, want)
	}
}
