package dhcp

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var kills = flag.Int("kills", 50, "how often TestKilledUnderLoad kills the server")

// load is many clients behind one relay, on a socket of the client's namespace.
type load struct {
	*net.UDPConn
	relay, server addr4
	last          uint32            // the number of the last client; 0: there is none
	acked         map[[6]byte]addr4 // what clients were told, and did not give back
	exchanges     int
	asked         map[uint32]time.Time // when the REQUESTs without an answer were sent
	answers       []time.Duration      // from each REQUEST to its ACK
	releases      bool                 // every eighth client gives its address back

	mu   sync.Mutex
	next uint32 // the number of the next client
}

// newLoad opens the relay's socket.
func newLoad(t testing.TB, relay, server string) *load {
	t.Helper()
	result := make(chan error)
	l := &load{relay: from(a(relay)), server: from(a(server)), asked: map[uint32]time.Time{}, acked: map[[6]byte]addr4{}}
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its goroutine
		ns, err := os.Open("/run/netns/client")
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err == nil {
			l.UDPConn, err = net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(relay), Port: serverPort}, &net.UDPAddr{IP: net.ParseIP(server), Port: serverPort})
		}
		result <- err
	}()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.SetReadBuffer(1 << 20)
	return l
}

func (l *load) card(n uint32) (mac [6]byte) {
	mac[0] = 2
	binary.BigEndian.PutUint32(mac[2:], n)
	return mac
}

func (l *load) say(k kind, n uint32, ip, client addr4) {
	be := binary.BigEndian
	b := make([]byte, headerSize, smallest)
	b[0], b[1], b[2] = bootRequest, 1, 6
	be.PutUint32(b[4:], n)
	be.PutUint32(b[12:], uint32(client))
	be.PutUint32(b[24:], uint32(l.relay))
	card := l.card(n)
	copy(b[28:], card[:])
	b = append(be.AppendUint32(b, cookie), optionKind, 1, byte(k))
	if ip != 0 {
		b = be.AppendUint32(append(b, optionRequested, 4), uint32(ip))
	}
	if k != kindDiscover && client == 0 {
		b = be.AppendUint32(append(b, optionServer, 4), uint32(l.server))
	}
	l.Write(append(b, optionEnd)) // a server that was killed refuses it
}

func (l *load) discover() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == 0 || l.next < l.last {
		l.next++
		l.say(kindDiscover, l.next, 0, 0)
	}
}

// pace begins exchanges at a rate for a while.
func (l *load) pace(rate int, d time.Duration) {
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() {
		began := time.Now()
		for sent := 0; time.Since(began) < d; time.Sleep(time.Millisecond) {
			for ; sent < int(float64(rate)*time.Since(began).Seconds()); sent++ {
				l.discover()
			}
		}
	})
	l.hear(d+100*time.Millisecond, 0)
}

// run keeps so many exchanges under way for a while.
func (l *load) run(window int, d time.Duration) {
	for range window {
		l.discover()
	}
	l.hear(d, window)
}

// hear answers offers until the time is over, then hears what is left. It keeps
// a window of exchanges under way.
func (l *load) hear(d time.Duration, window int) {
	end := time.Now().Add(d)
	b := make([]byte, 2048)
	for {
		l.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		n, err := l.Read(b)
		over := !time.Now().Before(end)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && (over || l.last != 0 && l.next >= l.last):
			return
		case err != nil && !over:
			for range window { // some were lost
				l.discover()
			}
		case err == nil:
			l.heard(b[:n], over, window > 0)
		case !errors.Is(err, unix.ECONNREFUSED):
			return
		}
	}
}

func (l *load) heard(b []byte, over, more bool) {
	be := binary.BigEndian
	if len(b) < headerSize+7 {
		return
	}
	n, ip, kind := be.Uint32(b[4:]), addr4(be.Uint32(b[16:])), kind(b[headerSize+6])
	switch {
	case kind == kindOffer && !over:
		l.asked[n] = time.Now()
		l.say(kindRequest, n, ip, 0)
	case kind == kindAck:
		l.exchanges++
		if at, ok := l.asked[n]; ok {
			l.answers = append(l.answers, time.Since(at))
			delete(l.asked, n)
		}
		l.acked[l.card(n)] = ip
		if l.releases && n%8 == 0 {
			delete(l.acked, l.card(n))
			l.say(kindRelease, n, 0, ip)
		}
		if !over && more {
			l.discover()
		}
	}
}

// A lease that was acknowledged is in the log whatever happens to the server,
// and no two clients have one address.
func TestKilledUnderLoad(t *testing.T) {
	rounds := *kills
	if testing.Short() {
		rounds = min(rounds, 5)
	}
	segment(t)
	sh(t, "ip addr add 10.0.0.1/12 dev srv && ip -n client addr add 10.0.0.2/12 dev cli")
	leases := filepath.Join(t.TempDir(), "dhcpd.leases")
	line := serverLine(t, "srv", "10.0.0.1", "10.0.0.0/12", "10.0.1.0", "10.15.255.250", leases)
	l := newLoad(t, "10.0.0.2", "10.0.0.1")
	l.releases = true
	for round := range rounds {
		if round%50 == 49 { // else a long campaign would be of long logs, and use the range up
			clear(l.acked)
			os.Remove(leases)
		}
		c := exec.Command("sh", "-c", "exec "+line)
		var out output
		c.Stdout, c.Stderr = &out, &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the server serves", func() bool { return strings.Contains(out.String(), "serving") })
		d := 20*time.Millisecond + rand.N(150*time.Millisecond)
		timer := time.AfterFunc(d, func() { c.Process.Kill() })
		l.run(64, d+10*time.Millisecond)
		timer.Stop()
		c.Process.Kill()
		c.Wait()
		checkAcked(t, round, l, leases)
		if t.Failed() {
			return
		}
	}
	t.Logf("%d leases were acknowledged in %d rounds, and kept", l.exchanges, rounds)
	if l.exchanges < 10*rounds {
		t.Errorf("only %d exchanges: this showed nothing", l.exchanges)
	}
}

func checkAcked(t *testing.T, round int, l *load, leases string) {
	t.Helper()
	all, err := ReadLeases(leases)
	if err != nil {
		t.Fatal(err)
	}
	kept := map[addr4]Lease{}
	for _, lease := range all {
		kept[from(lease.IP)] = lease
	}
	owner := map[addr4][6]byte{}
	for card, ip := range l.acked {
		if other, twice := owner[ip]; twice {
			t.Errorf("round %d: %s was given to %x and to %x", round, ip, other, card)
		}
		owner[ip] = card
		if got := kept[ip]; got.State != Active || got.MAC.String() != net.HardwareAddr(card[:]).String() {
			t.Errorf("round %d: %s was acknowledged to %x, and in the log is %+v", round, ip, card, got)
		}
	}
}

// 60,000 leases are served within a second, by a process of less than 60 MB.
func TestSixtyThousandLeases(t *testing.T) {
	if testing.Short() {
		t.Skip("it measures, which the race detector spoils: not with -short")
	}
	segment(t)
	sh(t, "ip addr add 10.0.0.1/12 dev srv && ip -n client addr add 10.0.0.2/12 dev cli")
	leases := filepath.Join(t.TempDir(), "dhcpd.leases")
	text := []byte(header)
	l := newLoad(t, "10.0.0.2", "10.0.0.1")
	now := time.Now().Unix()
	const count = 60000
	for n := range uint32(count) {
		card := l.card(n)
		text = formatRecord(text, &record{
			ip: from(a("10.0.1.0")) + addr4(n), mac: card, id: "\x01" + string(card[:]), hostname: fmt.Sprintf("microvm-%d", n), starts: now, ends: now + 600,
		})
	}
	if err := os.WriteFile(leases, text, 0o644); err != nil {
		t.Fatal(err)
	}
	var c *exec.Cmd
	var took time.Duration
	stop := func() { c.Process.Kill(); c.Wait() }
	for tries := 0; ; tries++ { // what else a machine does can only add
		began := time.Now()
		c = exec.Command("sh", "-c", "exec "+serverLine(t, "srv", "10.0.0.1", "10.0.0.0/12", "10.0.1.0", "10.15.255.250", leases))
		var out output
		c.Stdout, c.Stderr = &out, &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the server serves", func() bool { return strings.Contains(out.String(), "serving") })
		if took = time.Since(began); !strings.Contains(out.String(), fmt.Sprintf("serving %d leases", count)) {
			t.Error(out.String())
		}
		if took <= time.Second || tries == 2 {
			break
		}
		stop()
	}
	defer stop()
	l.next = 2 * count // none that has a lease
	l.releases = true  // compactions
	l.run(16, time.Second)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	var rss int
	fmt.Sscan(after, &rss)
	t.Logf("serves after %s, with %d kB at most, %d exchanges in the first second", took, rss, l.exchanges)
	if took > time.Second || rss > 60<<10 {
		t.Error("that is too much")
	}
}
