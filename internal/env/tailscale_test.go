package env

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestTailscale is what becomes of what files say of Tailscale, one after the other.
func TestTailscale(t *testing.T) {
	var was *Env
	for _, c := range []struct {
		text    string
		changes []string
	}{
		{"format: 2\nuplink: 172.31.254.0/30", []string{"+ environment"}},
		{"format: 2\ntailscale: {auth_key_file: /k}", []string{"+ Tailscale: the hub is network-hub, with the key in /k"}},
		{"format: 2\ntailscale: {auth_key_file: /k}", nil},
		{"format: 2\ntailscale: {auth_key_file: /k, login_server: 'https://headscale.example.org/', hostname: lab}",
			[]string{"~ Tailscale: the hub is lab, with the key in /k, at https://headscale.example.org, was the hub is network-hub, with the key in /k"}},
		{"format: 2", []string{"- Tailscale: the hub leaves the tailnet"}},
	} {
		e := resolve(t, c.text, was)
		lines := changes(was, e)
		if was == nil {
			lines = []string{lines[0][:len("+ environment")]}
		}
		if diff := cmp.Diff(c.changes, lines); diff != "" {
			t.Errorf("%s: %s", c.text, diff)
		}
		roundTrip(t, e)
		was = &e
	}
	// A file's key is beside it.
	d, err := Parse("/etc/lab/environment.yaml", []byte("format: 2\ntailscale: {auth_key_file: secret/key}"))
	if err != nil || d.Tailscale.KeyFile != "/etc/lab/secret/key" {
		t.Errorf("a relative path: %v, %v", d.Tailscale, err)
	}
	// Where nobody says another, the uplink is not one of a tailnet's addresses.
	if e := resolve(t, "format: 2\ntailscale: {auth_key_file: /k}", nil); e.Uplink.String() != "172.31.254.0/30" {
		t.Errorf("the uplink is %s", e.Uplink)
	}
	old := resolve(t, "format: 2", nil)
	d = parse(t, "format: 2\ntailscale: {auth_key_file: /k}")
	const want = "f:2: tailscale: the environment has 100.64.0.0/30, and tailnets give 100.64.0.0/10 to their peers: `ingot down` first, and leave uplink out or say another"
	if _, err := d.resolve("lab", &old, nobodyElse); err == nil || err.Error() != want {
		t.Errorf("an environment with another uplink: %v", err)
	}
}

func TestTailscaleMistakes(t *testing.T) {
	_, err := Parse("f", []byte(`format: 2
uplink: 100.64.0.0/30
tailscale:
  login_server: ftp://x
  hostname: Lab
  auth_key: tskey-auth-secret
`))
	want := strings.Join([]string{
		"f:2: uplink: 100.64.0.0/30 overlaps with 100.64.0.0/10, which tailnets give their peers",
		"f:3: tailscale: it has no auth_key_file: a file with an auth key, which the tailnet's administrator makes",
		`f:4: tailscale.login_server: "ftp://x" is not a server's URL, such as https://headscale.example.org`,
		`f:5: tailscale.hostname: "Lab" is not a machine's name: only lower-case letters, digits and dashes, none of them first or last, at most 63`,
		`f:6: tailscale: there is no key "auth_key", only auth_key_file, hostname, login_server`,
	}, "\n")
	if err == nil || cmp.Diff(want, err.Error()) != "" {
		t.Error(cmp.Diff(want, err.Error()))
	}
}

// TestTailscaleKey: the key is read where `up` runs, before anything is changed.
func TestTailscaleKey(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	file := filepath.Join(dir, "key")
	d := parse(t, "format: 2\nname: lab\ntailscale:\n  auth_key_file: "+file+"\n")
	objections := func() string {
		u := up{Options: Options{Declared: &d}, env: Env{Tailscale: *d.Tailscale}}
		o := u.tailscaleObjections()
		if o == nil && string(u.authKey) != "tskey-auth-x" {
			t.Errorf("the key is %q", string(u.authKey))
		}
		return strings.ReplaceAll(o.Error(), dir, "DIR")
	}
	if len(d.Tailscale.KeyFile) == 0 {
		t.Fatal("no key file")
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	got := objections()
	if want := "f:4: tailscale.auth_key_file: open DIR/key: no such file or directory"; !strings.HasSuffix(got, want) {
		t.Errorf("no key: %q, want %q", got, want)
	}
	if _, err := os.Stat("/usr/sbin/tailscaled"); err != nil && !strings.HasPrefix(got, "tailscale: this machine has no tailscale and no tailscaled: install the package tailscale, see https://tailscale.com/download/linux\n") {
		t.Errorf("no programs: %q", got)
	}
	write("tailscale", "")
	write("tailscaled", "")
	write("key", "\n")
	if got, want := objections(), "f:4: tailscale.auth_key_file: DIR/key has 0 words in it, and is to have an auth key alone"; got != want {
		t.Errorf("an empty key: %q, want %q", got, want)
	}
	write("key", "tskey-auth-x\n")
	if got := objections(); got != "" {
		t.Errorf("a key: %q", got)
	}
}
