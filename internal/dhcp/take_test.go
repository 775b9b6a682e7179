package dhcp

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/need"
)

// realDhcpd is isc-dhcp-server on srv, until stop.
func realDhcpd(t *testing.T, dir, conf string) (stop func()) {
	t.Helper()
	for name, text := range map[string]string{"conf": conf, "leases": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var out output
	c := exec.Command("dhcpd", "-4", "-f", "-d", "-cf", dir+"/conf", "-lf", dir+"/leases", "-pf", dir+"/pid", "srv")
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			c.Process.Signal(syscall.SIGTERM)
			c.Wait()
		}
	}
	t.Cleanup(stop)
	eventually(t, "dhcpd serves", func() bool { return strings.Contains(out.String(), "Server starting service") })
	return stop
}

// A hub that ran isc-dhcp-server becomes ours: its configuration serves, and its
// clients keep their addresses and don't notice.
func TestTakesOverFromRealDhcpd(t *testing.T) {
	for _, name := range []string{"dhcpd", "dhclient", "busybox"} {
		need.Binary(t, name)
	}
	segment(t)
	dir := t.TempDir()
	card := cardOf(t, "cli")
	stop := realDhcpd(t, dir, `default-lease-time 8; max-lease-time 7200; min-lease-time 5; authoritative; ping-check false; option domain-name "old.example.org"; option domain-name-servers 192.168.10.2;
subnet 192.168.10.0 netmask 255.255.255.128 { range 192.168.10.40 192.168.10.50; option routers 192.168.10.2; }
host printer { hardware ethernet 02:00:00:00:00:77; fixed-address 192.168.10.9; }
log-facility local7;
`)
	show := script(t, "env | grep -E '^(ip|lease|domain)='")
	// A client of before, which has gone and whose address is remembered.
	sh(t, in+"ip link set cli down; "+in+"ip link set cli address 02:00:00:00:00:05; "+in+"ip link set cli up")
	gone := sh(t, in+"busybox udhcpc -i cli -n -q -f -t 5 -x hostname:gone -s "+show+" 2>&1")
	sh(t, in+"ip link set cli down; "+in+"ip link set cli address "+card.String()+"; "+in+"ip link set cli up")
	set := script(t, "[ -z $new_ip_address ] || ip addr replace $new_ip_address/25 dev cli")
	out := background(t, in+"dhclient -4 -1 -d -v -sf "+set+" -lf "+dir+"/client -pf /dev/null cli")
	eventually(t, "the client is bound", func() bool { return strings.Contains(out.String(), "bound to 192.168.10.") })
	stop()

	d, err := ParseDhcpd(read(t, dir+"/conf"))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(d.Left); got != "[line 1: ping-check false: there is no such setting here line 4: log-facility local7: there is no such setting here]" {
		t.Errorf("left: %s", got)
	}
	leases, err := ReadLeases(dir + "/leases")
	if err != nil || len(leases) != 2 {
		t.Fatalf("dhcpd's leases: %+v, %v", leases, err)
	}
	i := slices.IndexFunc(leases, func(l Lease) bool { return l.MAC.String() == card.String() })
	had := leases[i]
	if !strings.Contains(out.String(), "bound to "+had.IP.String()) || !strings.Contains(gone, "ip="+leases[1-i].IP.String()) {
		t.Fatalf("dhcpd wrote %+v, and its clients say\n%s\n%s", leases, out, gone)
	}
	c := d.asConfig()
	ours := config(t)
	c.Interface, c.Server, c.LeaseFile, c.Log = ours.Interface, ours.Server, ours.LeaseFile, ours.Log
	fixed := c.Reservations
	c.Reservations = nil
	s, end := start(t, c)
	for _, r := range fixed {
		leases = append(leases, Lease{IP: r.IP, MAC: r.MAC, ClientID: r.ClientID, Hostname: r.Name, State: Reserved})
	}
	if left, err := s.Take(leases); err != nil || len(left) > 0 {
		t.Fatalf("left %v, %v", left, err)
	}
	taken := only(s, card)
	if taken == nil || taken.IP != had.IP || taken.State != Active || !taken.Ends.Equal(had.Ends) {
		t.Fatalf("%+v became %+v", had, taken)
	}
	eventually(t, "the client renews at ours, and keeps its address", func() bool {
		l := only(s, card)
		return l.IP == had.IP && l.State == Active && l.Ends.After(had.Ends)
	})
	if strings.Contains(out.String(), "DHCPNAK") || strings.Count(out.String(), "DHCPDISCOVER") > 1 {
		t.Errorf("the client noticed:\n%s", out)
	}
	end()
	again, _ := start(t, c)
	for mac, ip := range map[byte]string{5: leases[1-i].IP.String(), 0x77: "192.168.10.9"} {
		if got := ack(t, again, mac); got != ip {
			t.Errorf("after a restart, the card that ends in %d got %s, not %s", mac, got, ip)
		}
	}
}

// Nobody who has an address loses it to what is taken over.
func TestTakeLeavesWhatIsInUse(t *testing.T) {
	segment(t)
	c := config(t)
	s, _ := start(t, c)
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	mine := ack(t, s, 1, want("192.168.10.30"))
	if mine != "192.168.10.30" {
		t.Fatal(mine)
	}
	if _, err := s.Reserve(Reservation{MAC: mac(2), IP: a("192.168.10.50")}); err != nil {
		t.Fatal(err)
	}
	lease := func(n byte, ip string) Lease {
		return Lease{IP: a(ip), MAC: mac(n), State: Active, Starts: end.Add(-time.Hour), Ends: end, Hostname: fmt.Sprintf("box-%d", n)}
	}
	take := []Lease{
		lease(3, "192.168.10.30"), // another's
		lease(1, "192.168.10.31"), // of a card that has one
		lease(4, "192.168.10.50"), // kept for another
		lease(5, "192.168.10.5"),  // in no range
		lease(6, "10.1.1.1"),      // in no subnet
		{IP: a("192.168.10.33"), State: Active, Ends: end},
		{IP: a("192.168.10.30"), MAC: mac(8), State: Reserved},
		lease(7, "192.168.10.60"), // fine
		{IP: a("192.168.10.61"), MAC: mac(9), State: Released, Ends: end.Add(-2 * time.Hour)},
	}
	left, err := s.Take(take)
	if err != nil || len(left) != 7 {
		t.Fatalf("left %v, %v", left, err)
	}
	for i, l := range left {
		if l.IP != take[i].IP || l.Why == nil {
			t.Errorf("left %v, not %v", l, take[i])
		}
	}
	if !errdefs.IsInvalidArgument(left[4].Why) || !errdefs.IsAlreadyExists(left[1].Why) {
		t.Errorf("left %v", left)
	}
	if again, err := s.Take(take); err != nil || len(again) != 7 {
		t.Errorf("taken twice: %v, %v", again, err)
	}
	if l := only(s, mac(7)); l == nil || l.IP != a("192.168.10.60") || !l.Ends.Equal(end) || l.Hostname != "box-7" {
		t.Errorf("got %+v", l)
	}
	if ip, ok := s.Lookup("box-7"); !ok || ip != a("192.168.10.60") {
		t.Errorf("box-7 is %s", ip)
	}
	onDisk, err := ReadLeases(c.LeaseFile)
	if err != nil || !slices.ContainsFunc(onDisk, func(l Lease) bool { return l.IP == a("192.168.10.60") && l.State == Active && l.Ends.Equal(end) }) {
		t.Errorf("on disk: %+v, %v", onDisk, err)
	}
	for n, ip := range map[byte]string{1: "192.168.10.30", 7: "192.168.10.60", 9: "192.168.10.61"} {
		if got := ack(t, s, n); got != ip {
			t.Errorf("card %d got %s, not %s", n, got, ip)
		}
	}
}
