package dhcp

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/need"
)

// The others' configurations: the same addresses, leases and options.
const (
	keaConf = `{"Dhcp4": {"interfaces-config": {"interfaces": ["srv"], "dhcp-socket-type": "udp"},
		"lease-database": {"type": "memfile", "persist": true, "name": "DIR/leases.csv", "lfc-interval": 0}, "valid-lifetime": 600,
		"subnet4": [{"subnet": "10.0.0.0/12", "pools": [{"pool": "10.0.1.0 - 10.15.255.250"}],
			"option-data": [{"name": "routers", "data": "10.0.0.1"}, {"name": "domain-name-servers", "data": "147.75.207.207, 147.75.207.208"}]}],
		"loggers": [{"name": "kea-dhcp4", "output_options": [{"output": "/dev/null"}], "severity": "ERROR"}]}}`
	// Its table of a range is made at start: a smaller one.
	iscConf = `default-lease-time 600; max-lease-time 7200; authoritative; ping-check false;
		subnet 10.0.0.0 netmask 255.240.0.0 { range 10.0.1.0 10.0.255.250; option routers 10.0.0.1; option domain-name-servers 147.75.207.207, 147.75.207.208; }`
)

// commandLine is how one of the servers is run, with all of its files in dir.
func commandLine(b *testing.B, name, dir string) string {
	write := func(file, text string) {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(strings.ReplaceAll(text, "DIR", dir)), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	switch name {
	case "kea":
		need.Binary(b, "kea-dhcp4")
		write("conf", keaConf)
		return fmt.Sprintf("env KEA_PIDFILE_DIR=%[1]s KEA_LOCKFILE_DIR=%[1]s kea-dhcp4 -c %[1]s/conf", dir)
	case "isc":
		need.Binary(b, "dhcpd")
		write("conf", iscConf)
		write("leases", "")
		return fmt.Sprintf("dhcpd -4 -f -q -cf %[1]s/conf -lf %[1]s/leases -pf %[1]s/pid srv", dir)
	}
	return serverLine(b, "srv", "10.0.0.1", "10.0.0.0/12", "10.0.1.0", "10.15.255.250", filepath.Join(dir, "leases"))
}

// BenchmarkServers compares servers in processes of their own: exchanges of four
// messages a second with 64 clients at once, then the time to an ACK at half that
// rate, and what perfdhcp counts, if it is there.
//
//	go test -run xxx -bench Servers -benchtime 1x ./internal/dhcp
func BenchmarkServers(b *testing.B) {
	segment(b)
	sh(b, "ip addr add 10.0.0.1/12 dev srv && ip -n client addr add 10.0.0.2/12 dev cli")
	for _, name := range []string{"ingot", "kea", "isc"} {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				compare(b, name)
			}
		})
	}
}

func compare(b *testing.B, name string) {
	dir, err := os.MkdirTemp("/var/tmp", "dhcp") // not a tmpfs, which /tmp may be
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	c := exec.Command("sh", "-c", "exec "+commandLine(b, name, dir))
	var out output
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { c.Process.Kill(); c.Wait() }()
	l := newLoad(b, "10.0.0.2", "10.0.0.1")
	defer l.Close()
	eventually(b, "the server answers: "+out.String(), func() bool {
		l.discover()
		l.hear(50*time.Millisecond, 0)
		return l.exchanges > 0
	})
	l.exchanges = 0
	const d = 3 * time.Second
	l.run(64, d)
	rate := float64(l.exchanges) / d.Seconds()
	b.ReportMetric(rate, "exchanges/s")
	l.answers = nil
	syncs := make(chan []time.Duration)
	go func() { syncs <- syncTimes(b, filepath.Join(dir, "syncs"), d) }()
	l.pace(int(rate/2), d)
	slices.Sort(l.answers)
	b.ReportMetric(ms(l.answers[len(l.answers)/2]), "p50-ms")
	b.ReportMetric(ms(l.answers[len(l.answers)*99/100]), "p99-ms")
	alone := <-syncs
	b.ReportMetric(ms(alone[len(alone)*99/100]), "fdatasync-p99-ms")
	l.Close()
	if rate := perfdhcp(b); rate > 0 {
		b.ReportMetric(rate, "perfdhcp/s")
	}
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

// syncTimes is how long one write of an entry and its fdatasync take, on the same
// disk in the same time.
func syncTimes(b *testing.B, path string, d time.Duration) []time.Duration {
	f, err := os.Create(path)
	if err != nil {
		b.Error(err)
		return make([]time.Duration, 1)
	}
	defer f.Close()
	var all []time.Duration
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		began := time.Now()
		f.Write(make([]byte, 250))
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			b.Error(err)
		}
		all = append(all, time.Since(began))
	}
	slices.Sort(all)
	return all
}

var perfRate = regexp.MustCompile(`Rate: ([0-9.]+)`)

// perfdhcp is the best that kea's load generator sees; it loses much itself.
func perfdhcp(b *testing.B) (best float64) {
	if _, err := exec.LookPath("perfdhcp"); err != nil {
		return 0
	}
	for _, rate := range []int{4000, 8000, 16000} {
		// It fails if a message was lost.
		out, _ := exec.Command("sh", "-c", fmt.Sprintf("%s perfdhcp -4 -r %d -R 4000000 -p 3 -l 10.0.0.2 10.0.0.1", in, rate)).CombinedOutput()
		if m := perfRate.FindSubmatch(out); m != nil {
			got, _ := strconv.ParseFloat(string(m[1]), 64)
			best = max(best, got)
		}
	}
	return best
}
