package hub

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/nat"
	"ingot/internal/need"
	"ingot/internal/vpn"
)

// TestMoveTailscale: a hub that moves is who it was in a tailnet, where it is to be in one.
func TestMoveTailscale(t *testing.T) {
	config, _ := alone(t)
	text := usual(t, config)
	write(t, config, text+"tailscale: {hostname: lab-hub}\n")
	c, err := ReadConfig(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	state := mkdir(t, tailscaleDir) + "/tailscaled.state"
	for path, text := range map[string]string{state: "who it is", TailscaleKey: "tskey-auth-x"} {
		if err := replace(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	var archive bytes.Buffer
	if err := Export(&archive, c, false); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		config string // of the new machine; empty: none
		there  bool
	}{{"", true}, {text, false}} {
		for _, gone := range []string{"/etc/ingot", "/var/lib/ingot", leasesFile, config} {
			if err := os.RemoveAll(gone); err != nil {
				t.Fatal(err)
			}
		}
		if c.config != "" {
			write(t, config, c.config)
		}
		if _, err := Import(t.Context(), bytes.NewReader(archive.Bytes()), config, "test", false); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(state)
		if there := err == nil; there != c.there || there && info.Mode() != 0o600 {
			t.Errorf("with configuration %q: %v, %v", c.config, info, err)
		}
		if info, err := os.Stat(TailscaleKey); err != nil || info.Mode() != 0o600 {
			t.Errorf("the key: %v, %v", info, err)
		}
	}
}

// A hub moves to a new machine, which has nothing: there it is who it was, with every
// lease, and its VPN's peers.
func TestMove(t *testing.T) {
	config, hub := alone(t)
	dir := filepath.Dir(config)
	text := usual(t, config)
	write(t, config, text+"vpn: {subnet: 10.91.0.0/24, port: 51820, endpoint: \"hub.example.org:51820\"}\n")
	c, err := ReadConfig(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	archive := func(images bool) *bytes.Buffer {
		t.Helper()
		var b bytes.Buffer
		if err := Export(&b, c, images); err != nil {
			t.Fatal(err)
		}
		return &b
	}
	unused := archive(false)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	kill := start(t, config)
	if _, err := hub.Facts(ctx, &emptypb.Empty{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	show := write(t, dir+"/show", "#!/bin/sh\nenv | grep '^ip='\n")
	ask := "ip netns exec guest busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -x hostname:box -s " + show + " 2>&1"
	sh(t, ask)
	if _, err := hub.Reserve(ctx, &ingotv1.ReserveRequest{Mac: "02:00:00:00:00:01", Ip: "192.168.10.50"}); err != nil {
		t.Fatal(err)
	}
	key, err := vpn.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	peer, err := hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: "laptop", PublicKey: key.Public().String()})
	if err != nil {
		t.Fatal(err)
	}
	state := func() string {
		t.Helper()
		leases, err := hub.ListLeases(ctx, &ingotv1.ListLeasesRequest{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, l := range leases.GetLeases() {
			b.WriteString(l.String() + "\n")
		}
		peers, err := hub.ListVPNPeers(ctx, &ingotv1.ListVPNPeersRequest{})
		if err != nil || len(peers.GetPeers()) != 1 || peers.GetPeers()[0].GetPublicKey() != key.Public().String() {
			t.Fatalf("peers: %v, %v", peers, err)
		}
		return b.String()
	}
	was := state()
	write(t, mkdir(t, "/var/lib/ingot/registry")+"/image", "layers")
	web := access{Guest: &guest{UID: "1", Namespace: "default", Name: "web", Host: "host-0"}, Ports: []nat.Port{{Protocol: "tcp", Port: 80, To: 8080}}}
	if err := (&accesses{file: accessFile}).save([]access{web}); err != nil {
		t.Fatal(err)
	}

	// While it runs, with its last word.
	lean, whole := archive(false), archive(true)
	if bytes.Contains(lean.Bytes(), []byte("registry/image")) || !bytes.Contains(whole.Bytes(), []byte("registry/image")) {
		t.Error("images are in the archive without a word, or are not with one")
	}
	short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	if _, err := Import(short, bytes.NewReader(lean.Bytes()), config, "test", true); err == nil || !strings.Contains(err.Error(), "a hub runs here") {
		t.Errorf("import beside a hub that runs: %v", err)
	}
	stop()
	// What is given later is in no archive.
	if _, err := hub.Reserve(ctx, &ingotv1.ReserveRequest{Mac: "02:00:00:00:00:02", Ip: "192.168.10.51"}); err != nil {
		t.Fatal(err)
	}
	other, err := vpn.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: "phone", PublicKey: other.Public().String()}); err != nil {
		t.Fatal(err)
	}
	kill()
	const lost = "has 1 leases, 2 reservations, 2 VPN peers that would be lost"
	if _, err := Import(ctx, bytes.NewReader(lean.Bytes()), config, "test", false); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), lost) {
		t.Errorf("import over what a hub has given: %v", err)
	}

	// The new machine.
	for _, gone := range []string{config, "/etc/ingot", "/var/lib/ingot", leasesFile} {
		if err := os.RemoveAll(gone); err != nil {
			t.Fatal(err)
		}
	}
	// A first try does not come to its end.
	if _, err := Import(ctx, bytes.NewReader(whole.Bytes()[:whole.Len()/2]), config, "test", false); err == nil {
		t.Error("half an archive is imported")
	}
	if stays, err := Import(ctx, bytes.NewReader(whole.Bytes()), config, "test", false); err != nil || len(stays) != 0 {
		t.Fatalf("stays: %v, %v", stays, err)
	}
	for path, mode := range map[string]os.FileMode{"/etc/ingot/pki/key.pem": 0o600, accessFile: 0o600, vpnDir: os.ModeDir | 0o700, "/var/lib/ingot/registry/image": 0o755} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v, want %s", path, info.Mode(), err, mode)
		}
	}
	published := accesses{file: accessFile}
	if err := published.load(); err != nil || !reflect.DeepEqual(published.all, []access{web}) {
		t.Errorf("published are %+v, %v, want %+v", published.all, err, web)
	}
	if image, err := os.ReadFile("/var/lib/ingot/registry/image"); string(image) != "layers" {
		t.Errorf("the image is %q, %v", image, err)
	}
	if left, err := filepath.Glob("/var/lib/ingot/*import*"); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	began := time.Now()
	kill = start(t, config)
	if is := state(); is != was {
		t.Errorf("there is\n%s\nand was\n%s", is, was)
	}
	if took := time.Since(began); took > 5*time.Second { // it is some 0.3 s
		t.Errorf("it serves after %s", took)
	}
	if got := sh(t, ask); !strings.Contains(got, "ip=192.168.10.26\n") {
		t.Errorf("the client gets\n%s", got)
	}
	again, err := hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: "laptop", PublicKey: key.Public().String()})
	if err != nil || again.GetPublicKey() != peer.GetPublicKey() || again.GetPeer().GetAddress() != peer.GetPeer().GetAddress() {
		t.Errorf("the VPN's key: %v, %v, not %v", again, err, peer)
	}
	kill()
	// Where there is a hub already, that is who it stays.
	if stays, err := Import(ctx, bytes.NewReader(lean.Bytes()), config, "test", true); err != nil || strings.Join(stays, " ") != config+" /etc/ingot/pki /etc/ingot/token" {
		t.Errorf("stays: %v, %v", stays, err)
	}

	// As an import leaves it that is interrupted before the last step.
	if err := os.Remove(leasesFile); err != nil {
		t.Fatal(err)
	}
	if _, err := Import(ctx, bytes.NewReader(unused.Bytes()), config, "test", false); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "has 1 VPN peers that would be lost") {
		t.Errorf("import over a peer: %v", err)
	}
	if _, err := Import(ctx, bytes.NewReader(lean.Bytes()), config, "test", false); err != nil {
		t.Errorf("repeat an import: %v", err)
	}

	// The archive of a hub that has given nothing leaves nothing.
	write(t, mkdir(t, filepath.Dir(importedFile))+"/"+filepath.Base(importedFile), "option domain-name \"old\";\n")
	write(t, guestsFile, "[]")
	if _, err := Import(ctx, bytes.NewReader(unused.Bytes()), config, "test", true); err != nil {
		t.Error(err)
	}
	for name, path := range c.kept(true) {
		if _, err := os.Stat(path); (err == nil) != (name == imagesName) {
			t.Errorf("%s of the hub that was here: %v", name, err)
		}
	}
}

// usual has a configuration's files be where Ingot's usually are.
func usual(t *testing.T, config string) (text string) {
	t.Helper()
	t.Cleanup(func() { os.RemoveAll("/etc/ingot") })
	dir := filepath.Dir(config)
	sh(t, fmt.Sprintf("mkdir -p /etc/ingot; cp -rp %[1]s/hub /etc/ingot/pki; mv %[1]s/token /etc/ingot/token", dir))
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	text = strings.NewReplacer(dir+"/hub", "/etc/ingot/pki", dir+"/token", "/etc/ingot/token", dir+"/registry", "/var/lib/ingot/registry").Replace(string(b))
	write(t, config, text)
	return text
}

// What import puts in its place is on the disk: each file, and each directory, without
// which there is no file after a power cut.
func TestImportIsSynced(t *testing.T) {
	need.Root(t)
	need.Binary(t, "strace")
	dir := t.TempDir()
	write(t, mkdir(t, dir+"/from/a/b")+"/file", "text")
	write(t, dir+"/from/file", "text")
	trace := exec.Command("strace", "-f", "-y", "-e", "trace=fsync", "-o", dir+"/trace", "-p", fmt.Sprint(os.Getpid()))
	said, err := trace.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := trace.Start(); err != nil {
		t.Fatal(err)
	}
	said.Read(make([]byte, 1)) // that it is attached
	err = put(dir+"/from", dir+"/x/y/to")
	trace.Process.Signal(os.Interrupt)
	trace.Wait()
	if err != nil {
		t.Fatal(err)
	}
	synced, err := os.ReadFile(dir + "/trace")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"", "/x", "/x/y", "/x/y/to.import", "/x/y/to.import/a", "/x/y/to.import/a/b", "/x/y/to.import/a/b/file", "/x/y/to.import/file"} {
		if !strings.Contains(string(synced), "<"+dir+path+">") {
			t.Errorf("%s is not synced", path)
		}
	}
}

// What is on another disk is in the archive, too, or its absence is told.
func TestExportFollowsLinks(t *testing.T) {
	need.Root(t)
	disk, dir := t.TempDir(), t.TempDir()
	write(t, mkdir(t, disk+"/registry/blobs")+"/image", "layers")
	write(t, mkdir(t, disk+"/pki")+"/key-1.pem", "key")
	write(t, disk+"/token", "secret")
	sh(t, fmt.Sprintf("cd %s; ln -s key-1.pem %s/pki/key.pem; ln -s %[2]s/registry %[2]s/pki %[2]s/token .", dir, disk))
	c := Config{PKI: dir + "/pki", TokenFile: dir + "/token", Registry: dir + "/registry"}
	export := func() (map[string]string, error) {
		var b bytes.Buffer
		if err := Export(&b, c, true); err != nil {
			return nil, err
		}
		files := map[string]string{}
		for r := tar.NewReader(&b); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				return files, nil
			}
			if err != nil {
				return nil, err
			}
			text, err := io.ReadAll(r)
			if err != nil {
				return nil, err
			}
			files[h.Name] = string(text)
		}
	}
	files, err := export()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"registry/blobs/image": "layers", "pki/key-1.pem": "key", "pki/key.pem": "key", "token": "secret"} {
		if got, ok := files[name]; !ok || got != want {
			t.Errorf("%s: %q, %v", name, got, ok)
		}
	}
	for _, to := range []string{disk + "/pki", "nowhere"} {
		sh(t, fmt.Sprintf("ln -sfn %s %s/registry/blobs/more", to, disk))
		if _, err := export(); err == nil || !strings.Contains(err.Error(), "registry/blobs/more") {
			t.Errorf("with a link to %s within: %v", to, err)
		}
	}
	sh(t, fmt.Sprintf("rm %s/registry/blobs/more; ln -sfn nowhere %s/registry", disk, dir))
	if _, err := export(); err == nil || !strings.Contains(err.Error(), dir+"/registry") {
		t.Errorf("with a link that leads nowhere: %v", err)
	}
}

// An archive has no say about what is not Ingot's.
func TestImportKeepsToItsPlaces(t *testing.T) {
	need.Root(t)
	t.Cleanup(func() {
		os.RemoveAll("/var/lib/ingot")
		os.RemoveAll("/etc/other")
	})
	const declared = "address: 192.168.10.2\nsubnet: 192.168.10.0/25\nrange-first: 192.168.10.26\nrange-last: 192.168.10.126\ndomain: lab.internal\n"
	file := write(t, mkdir(t, "/etc/other")+"/file", "mine")
	for line, want := range map[string]string{
		"registry: /etc":                            "registry: \"/etc\" is not below /etc/ingot or /var/lib/ingot",
		"registry: /etc/other":                      "registry: \"/etc/other\" is not below",
		"registry: /var/lib/ingot/../../../etc":     "registry: \"/var/lib/ingot/../../../etc\" is not below",
		"registry: /var/lib/ingot":                  "registry: \"/var/lib/ingot\" is not below",
		"registry: var/lib/ingot/registry":          "registry: \"var/lib/ingot/registry\" is not below",
		"registry: /var/lib/ingot/vpn":              "registry: /var/lib/ingot/vpn is not apart from /var/lib/ingot/vpn, where vpn is",
		"registry: /var/lib/ingot/import.new/x":     "where what import unpacks is",
		"pki: /etc/other":                           "pki: \"/etc/other\" is not below",
		"pki: /etc/ingot/hub.yaml":                  "pki: /etc/ingot/hub.yaml is not apart from",
		"token-file: /etc/other/file":               "token-file: \"/etc/other/file\" is not below",
		"token-file: /etc/ingot/pki":                "token-file: /etc/ingot/pki is not apart from /etc/ingot/pki, where pki is",
		"{pki: /etc/ingot/a, registry: /etc/other}": "registry: \"/etc/other\" is not below",
	} {
		dir := t.TempDir()
		archived := write(t, dir+"/hub.yaml", declared+strings.NewReplacer("{", "", "}", "", ", ", "\n").Replace(line)+"\n")
		from := Config{file: archived, PKI: mkdir(t, dir+"/pki"), TokenFile: write(t, dir+"/token", "secret\n"), Registry: mkdir(t, dir+"/registry")}
		write(t, dir+"/pki/key.pem", "key")
		write(t, dir+"/registry/image", "layers")
		var b bytes.Buffer
		if err := Export(&b, from, true); err != nil {
			t.Fatal(err)
		}
		config := dir + "/new.yaml"
		_, err := Import(t.Context(), &b, config, "test", true)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", line, err)
		}
		if b, err := os.ReadFile(file); string(b) != "mine" {
			t.Fatalf("%s: %s is %q, %v", line, file, b, err)
		}
		for _, none := range []string{config, "/etc/ingot", "/etc/other/key.pem", "/etc/other/image", stagedDir} {
			if _, err := os.Stat(none); err == nil {
				t.Errorf("%s: there is %s", line, none)
			}
		}
	}
}

func mkdir(t *testing.T, dir string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// What is no archive of ours changes nothing.
func TestImportRefuses(t *testing.T) {
	const about = `{"format": 1}`
	pack := func(headers ...tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			text := about
			if h.Name == manifestName && h.Linkname != "" {
				text, h.Linkname = h.Linkname, ""
			}
			if h.Typeflag == 0 || h.Typeflag == tar.TypeReg {
				h.Size = int64(len(text))
			}
			h.Mode = 0o644
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if h.Size > 0 {
				if _, err := w.Write([]byte(text)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	first, end := tar.Header{Name: manifestName}, tar.Header{Name: endName}
	if err := unpack(bytes.NewReader(pack(first, tar.Header{Name: "leases"}, tar.Header{Name: "vpn/peers"}, end)), filepath.Join(t.TempDir(), "staged")); err != nil {
		t.Errorf("what is one: %v", err)
	}
	for name, archive := range map[string][]byte{
		"nothing":    {},
		"no end":     pack(first, tar.Header{Name: "leases"}),
		"not tar":    []byte(strings.Repeat("x", 2000)),
		"no word":    pack(tar.Header{Name: "leases"}, end),
		"new format": pack(tar.Header{Name: manifestName, Linkname: `{"format": 2}`}, end),
		"outside":    pack(first, tar.Header{Name: "vpn/../../x"}, end),
		"root":       pack(first, tar.Header{Name: "/etc/passwd"}, end),
		"unknown":    pack(first, tar.Header{Name: "bin/sh"}, end),
		"link":       pack(first, tar.Header{Name: "vpn", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, end),
		"twice":      pack(first, tar.Header{Name: "leases"}, tar.Header{Name: "leases"}, end),
	} {
		dir := filepath.Join(t.TempDir(), "staged")
		err := unpack(bytes.NewReader(archive), dir)
		if err == nil {
			t.Errorf("%s: it is taken", name)
		}
		if _, err := os.Stat(filepath.Join(dir, "..", "x")); err == nil {
			t.Errorf("%s: it has written outside", name)
		}
	}
}
