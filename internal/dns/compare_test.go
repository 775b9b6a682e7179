package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"ingot/internal/need"
)

// What is asked for: so many names, by so many clients, each of which waits for so many
// answers at the same time.
const (
	loadNames, loadClients, loadWindow = 1000, 8, 32
	loadTime                           = 3 * time.Second
)

// BenchmarkServers compares servers in processes of their own, on loopback: answers a
// second that each gives from its cache, and from what it knows itself, and how much of a
// CPU one takes.
//
//	go test -run xxx -bench Servers -benchtime 1x -count 5 ./internal/dns
func BenchmarkServers(b *testing.B) {
	upstream := loadUpstream(b)
	for _, name := range []string{"ingot", "dnsmasq"} {
		at := unusedPort(b)
		line := dnsmasqLine
		if name == "ingot" {
			line = "env INGOT_DNS_SERVER='127.0.0.1 PORT UPSTREAM' " + os.Args[0]
		} else {
			need.Binary(b, "dnsmasq")
		}
		line = strings.NewReplacer("PORT", fmt.Sprint(at.Port()), "UPSTREAM", fmt.Sprint(upstream.Port())).Replace(line)
		for _, domain := range []string{"example.org", "lab.internal"} {
			b.Run(name+"/"+domain, func(b *testing.B) {
				for range b.N {
					measure(b, line, at, domain)
				}
			})
		}
	}
}

const dnsmasqLine = "dnsmasq -k -C /dev/null -u root -p PORT -a 127.0.0.1 -z -R -h -x '' --server=127.0.0.1#UPSTREAM --cache-size=10000 " +
	"--dns-forward-max=1000 --addn-hosts=HOSTS"

// measure runs one server, and puts it under load.
func measure(b *testing.B, line string, at netip.AddrPort, domain string) {
	hosts := b.TempDir() + "/hosts"
	var text strings.Builder
	for i := range loadNames {
		fmt.Fprintf(&text, "192.168.10.3 x%d.lab.internal\n", i)
	}
	if err := os.WriteFile(hosts, []byte(text.String()), 0o644); err != nil {
		b.Fatal(err)
	}
	c := exec.Command("sh", "-c", "exec "+strings.ReplaceAll(line, "HOSTS", hosts))
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		b.Fatal(err)
	}
	ended := false
	end := func() {
		if !ended {
			ended = true
			c.Process.Kill()
			c.Wait()
		}
	}
	defer end()
	questions := make([][]byte, loadNames)
	client := dns.Client{Timeout: 200 * time.Millisecond}
	for i := range questions {
		m := new(dns.Msg).SetQuestion(fmt.Sprintf("x%d.%s.", i, domain), dns.TypeA)
		var err error
		if questions[i], err = m.Pack(); err != nil {
			b.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; { // and so it is in the cache
			if r, _, err := client.Exchange(m, at.String()); err == nil && len(r.Answer) == 1 {
				break
			}
			if time.Now().After(deadline) {
				b.Fatalf("%s does not answer", line)
			}
		}
	}
	before := cpuTime(b, c.Process.Pid)
	var mu sync.Mutex // guards answers
	answers := 0
	var clients sync.WaitGroup
	for i := range loadClients {
		clients.Go(func() {
			n := load(b, at, questions, i)
			mu.Lock()
			defer mu.Unlock()
			answers += n
		})
	}
	clients.Wait()
	took := cpuTime(b, c.Process.Pid) - before
	end()
	b.ReportMetric(float64(answers)/loadTime.Seconds(), "answers/s")
	b.ReportMetric(float64(took.Nanoseconds())/float64(answers), "cpu-ns/answer")
	b.ReportMetric(took.Seconds()/loadTime.Seconds(), "cpus")
	b.ReportMetric(0, "ns/op")
}

// load is one client, which has many questions under way: how many answers it got.
func load(b *testing.B, at netip.AddrPort, questions [][]byte, first int) (answers int) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Error(err)
		return 0
	}
	defer conn.Close()
	conn.SetReadBuffer(1 << 20)
	messages, err := newBatch(conn)
	if err != nil {
		b.Error(err)
		return 0
	}
	next := first * 97
	question := func() []byte { next++; return questions[next%len(questions)] }
	for end := time.Now().Add(loadTime); time.Now().Before(end); { // again, if some were lost
		for range loadWindow {
			conn.WriteToUDPAddrPort(question(), at)
		}
		for time.Now().Before(end) {
			conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			n, err := messages.receive()
			if err != nil {
				break
			}
			for i := range n {
				m, _ := messages.message(i)
				if len(m) < headerSize || binary.BigEndian.Uint16(m[2:])&maskCode != 0 || binary.BigEndian.Uint16(m[6:]) != 1 {
					b.Errorf("answer %x", m)
					return answers
				}
				messages.answer(i, question())
			}
			answers += n
			if err := messages.send(n); err != nil {
				break
			}
		}
	}
	return answers
}

// cpuTime is how long a process has used CPUs (proc_pid_stat(5)).
func cpuTime(b *testing.B, pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	var user, system int64
	fields := strings.Fields(rest)
	fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
	return time.Duration(user+system) * time.Second / 100
}

// loadUpstream answers whatever it is asked.
func loadUpstream(b *testing.B) netip.AddrPort {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := &dns.Server{PacketConn: c, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: net.IPv4(192, 0, 2, 1)}}
		w.WriteMsg(m)
	})}
	go s.ActivateAndServe()
	b.Cleanup(func() { s.Shutdown() })
	return netip.MustParseAddrPort(c.LocalAddr().String())
}

func unusedPort(b *testing.B) netip.AddrPort {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	return netip.MustParseAddrPort(c.LocalAddr().String())
}

// TestMain is a server that others measure, or runs the tests.
func TestMain(m *testing.M) {
	var ip, port, upstream string
	if n, _ := fmt.Sscan(os.Getenv("INGOT_DNS_SERVER"), &ip, &port, &upstream); n != 3 {
		os.Exit(m.Run())
	}
	s := New(Config{
		Listen: []netip.AddrPort{netip.MustParseAddrPort(ip + ":" + port)}, Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
		Upstreams: []string{"127.0.0.1:" + upstream}, Domain: "lab.internal", Server: "network-hub", Log: slog.New(slog.DiscardHandler),
		Lookup: func(name string) (netip.Addr, bool) {
			return netip.MustParseAddr("192.168.10.3"), strings.HasPrefix(name, "x")
		},
		NameOf: func(netip.Addr) (string, bool) { return "", false },
	})
	if err := s.Run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
