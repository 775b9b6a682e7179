package nat_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/need"
)

// The cards of the tests below, on a bridge as a lab's host has it.
var (
	guestMAC = link.MAC("guest")
	otherMAC = link.MAC("other")
	worldMAC = link.MAC("world") // the hub's, as far as guests are concerned
	everyone = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

const guestTap, otherTap, worldTap, guestMacvtap = "fltap0000001", "fltap0000002", "world0", "flvtap0000001"

// card is the hypervisor's end of a guest's device.
type card struct {
	t    *testing.T
	name string
	file *os.File
}

func (c card) send(frame []byte) {
	c.t.Helper()
	if _, err := c.file.Write(append(make([]byte, 10), frame...)); err != nil { // virtio's header
		c.t.Fatalf("send by %s: %v", c.name, err)
	}
}

// heard says whether a frame that contains text comes before the time is over.
func (c card) heard(text string, within time.Duration) bool {
	c.t.Helper()
	c.file.SetReadDeadline(time.Now().Add(within))
	frame := make([]byte, 2048)
	for {
		n, err := c.file.Read(frame)
		if err != nil {
			return false
		}
		if bytes.Contains(frame[:n], []byte(text)) {
			return true
		}
	}
}

func open(t *testing.T, name string, opener func(string) (*os.File, error)) card {
	t.Helper()
	f, err := opener(name)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(f.Fd()))
	f.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that it can have deadlines
	}
	if err != nil {
		t.Fatal(err)
	}
	f = os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close(); link.Remove(name) })
	return card{t, name, f}
}

// segment makes a bridge with the host's own interface and taps on it, and a guard.
func segment(t *testing.T) (g *nat.Guard, h nat.Host, guest, other, world card) {
	t.Helper()
	needs(t)
	ip(t, "link add ingot0 type bridge")
	t.Cleanup(func() { link.Remove("ingot0"); nat.Remove(nat.Table) })
	ip(t, "link set ingot0 up")
	for _, key := range []string{"iptables", "ip6tables", "arptables"} { // as in a lab's machines
		os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+key, []byte("0"), 0)
	}
	ip(t, "link add bond0.1000 type veth peer name seg0")
	t.Cleanup(func() { link.Remove("bond0.1000") })
	ip(t, "link set seg0 master ingot0 up")
	ip(t, "link set bond0.1000 up")
	var cards []card
	for name, mac := range map[string]net.HardwareAddr{guestTap: guestMAC, otherTap: otherMAC, worldTap: nil} {
		for range 2 {
			if _, err := link.EnsureTap(name, link.Tap{Bridge: "ingot0", MAC: mac}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, name := range []string{guestTap, otherTap, worldTap} {
		cards = append(cards, open(t, name, link.OpenTap))
	}
	h = exampleHost()
	info, err := link.Get("bond0.1000")
	if err != nil {
		t.Fatal(err)
	}
	h.MAC = info.MAC
	if g, err = nat.OpenGuard(h); err != nil {
		t.Fatal(err)
	}
	for device, mac := range map[string]net.HardwareAddr{guestTap: guestMAC, otherTap: otherMAC} {
		if err := g.Set(device, nat.Guest{MAC: mac}); err != nil {
			t.Fatal(err)
		}
	}
	cards[0].settle(guestMAC, cards[2])
	cards[1].settle(otherMAC, cards[2])
	return g, h, cards[0], cards[1], cards[2]
}

// settle waits until world hears the card: a bridge's port forwards some time after
// its cable is plugged.
func (c card) settle(mac net.HardwareAddr, world card) {
	c.t.Helper()
	for range 200 {
		c.send(ether(everyone, mac, 0x88b5, []byte("settled: "+c.name)))
		if world.heard("settled: "+c.name, 50*time.Millisecond) {
			return
		}
	}
	c.t.Fatalf("%s is not heard", c.name)
}

func ip(t *testing.T, command string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", command, err, out)
	}
}

func ether(to, from net.HardwareAddr, protocol uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16(append(bytes.Clone(to), from...), protocol), payload...)
}

func arp(mac net.HardwareAddr, from, target string) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, mac...)
	b = append(b, netip.MustParseAddr(from).AsSlice()...)
	b = append(b, make([]byte, 6)...)
	return append(b, netip.MustParseAddr(target).AsSlice()...)
}

// ipv4 is a packet with as many words of options, and of which fragment.
func ipv4(from, to string, protocol byte, options int, fragment uint16, payload []byte) []byte {
	b := make([]byte, 20+4*options)
	b[0], b[8], b[9] = 0x45+byte(options), 64, protocol
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(payload)))
	binary.BigEndian.PutUint16(b[6:], fragment)
	copy(b[12:], netip.MustParseAddr(from).AsSlice())
	copy(b[16:], netip.MustParseAddr(to).AsSlice())
	for i := 20; i < len(b); i++ {
		b[i] = 1 // no operation
	}
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	return append(b, payload...)
}

func ipv6(from, to string, protocol byte, payload []byte) []byte {
	b := []byte{0x60, 0, 0, 0, byte(len(payload) >> 8), byte(len(payload)), protocol, 255}
	b = append(b, netip.MustParseAddr(from).AsSlice()...)
	return append(append(b, netip.MustParseAddr(to).AsSlice()...), payload...)
}

func udp(from, to uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

func tcp(port uint16, flags byte) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b[2:], port)
	b[0], b[12], b[13] = 0x80, 0x50, flags
	return b
}

func request(mac net.HardwareAddr) []byte {
	m, err := dhcpv4.New(dhcpv4.WithHwAddr(mac), dhcpv4.WithMessageType(dhcpv4.MessageTypeDiscover))
	if err != nil {
		panic(err)
	}
	return m.ToBytes()
}

// acknowledge is what a DHCP server tells a card.
func acknowledge(mac net.HardwareAddr, your string, lease time.Duration) []byte {
	return ether(everyone, worldMAC, unix.ETH_P_IP, ipv4("192.168.10.2", "255.255.255.255", unix.IPPROTO_UDP, 0, 0, udp(67, 68, answerTo(mac, 5, your, lease))))
}

func answerTo(mac net.HardwareAddr, kind byte, your string, lease time.Duration) []byte {
	b := make([]byte, 240)
	copy(b, []byte{2, 1, 6})
	copy(b[16:], netip.MustParseAddr(your).AsSlice())
	copy(b[28:], mac)
	b = append(b[:236], 99, 130, 83, 99, 53, 1, kind, 54, 4, 192, 168, 10, 2, 51, 4)
	return append(binary.BigEndian.AppendUint32(b, uint32(lease.Seconds())), 255)
}

// made is the address that a card makes in a network.
func made(prefix string, mac net.HardwareAddr) string {
	b := netip.MustParseAddr(prefix).As16()
	copy(b[8:], []byte{mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
	return netip.AddrFrom16(b).String()
}

// neighbour is what IPv6 neighbours say about an address.
func neighbour(kind byte, target string) []byte {
	return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr(target).AsSlice()...)
}

// TestGuestFrames: what a guest sends, and whether anybody on the segment hears it.
func TestGuestFrames(t *testing.T) {
	g, h, guest, _, world := segment(t)
	const me, them, hubIP, hostIP, all, cluster = "192.168.10.30", "192.168.10.31", "192.168.10.2", "192.168.10.3", "255.255.255.255", "192.168.10.25"
	v4 := func(payload []byte) []byte { return ether(everyone, guestMAC, unix.ETH_P_IP, payload) }
	v6 := func(payload []byte) []byte { return ether(everyone, guestMAC, unix.ETH_P_IPV6, payload) }
	mine, theirs, slaac := made("fe80::", guestMAC), made("fe80::", otherMAC), made("2001:db8:1:2::", guestMAC)
	const private, cluster6 = "fe80::1234", "2001:db8::25"
	from6 := func(from string) []byte { return v6(ipv6(from, "ff02::1", unix.IPPROTO_UDP, udp(1000, 1000, nil))) }
	says6 := func(from string, kind byte, target string) []byte {
		return v6(ipv6(from, "ff02::1", unix.IPPROTO_ICMPV6, neighbour(kind, target)))
	}
	udp4 := func(to string, from, port uint16, payload []byte) []byte {
		return v4(ipv4(me, to, unix.IPPROTO_UDP, 0, 0, udp(from, port, payload)))
	}
	ask := func(mac net.HardwareAddr, options int, fragment uint16, cut int) []byte {
		return v4(ipv4("0.0.0.0", all, unix.IPPROTO_UDP, options, fragment, udp(68, 67, request(mac))[:cut]))
	}
	const moreFragments, whole = 0x2000, 8 + 240
	cases := []struct {
		name   string
		frame  []byte
		passes bool
	}{
		{"anything to anybody", ether(everyone, guestMAC, 0x88b5, nil), true},
		{"another guest's MAC", ether(everyone, otherMAC, 0x88b5, nil), false},
		{"the hub's MAC", ether(everyone, worldMAC, 0x88b5, nil), false},
		{"the host's MAC", ether(everyone, h.MAC, 0x88b5, nil), false},
		{"a VLAN", ether(everyone, guestMAC, unix.ETH_P_8021Q, []byte{0, 5, 0x88, 0xb5}), false},
		{"a provider's VLAN", ether(everyone, guestMAC, unix.ETH_P_8021AD, []byte{0, 5, 0x88, 0xb5}), false},

		{"ARP", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, me, hubIP)), true},
		{"ARP with another's MAC", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(otherMAC, me, hubIP)), false},
		{"ARP as the hub", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, hubIP, me)), false},
		{"ARP as a host", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, hostIP, hostIP)), false},

		{"ARP as another guest", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, them, them)), false},
		{"an ARP probe", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, "0.0.0.0", them)), true},
		{"ARP as the cluster", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, cluster, cluster)), true},
		{"ARP from an allowed prefix", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, "10.42.3.9", me)), true},
		{"ARP from beside an allowed prefix", ether(everyone, guestMAC, unix.ETH_P_ARP, arp(guestMAC, "10.42.4.1", me)), false},

		{"from another guest's address", v4(ipv4(them, "1.1.1.1", unix.IPPROTO_UDP, 0, 0, udp(1000, 1000, nil))), false},
		{"a fragment from another guest's address", v4(ipv4(them, "1.1.1.1", unix.IPPROTO_UDP, 0, 100, make([]byte, 16))), false},
		{"from no address", v4(ipv4("0.0.0.0", "1.1.1.1", unix.IPPROTO_UDP, 0, 0, udp(1000, 1000, nil))), false},
		{"from the cluster's address", v4(ipv4(cluster, "1.1.1.1", unix.IPPROTO_UDP, 0, 0, udp(1000, 1000, nil))), true},
		{"from an allowed prefix", v4(ipv4("10.42.3.9", "1.1.1.1", unix.IPPROTO_UDP, 0, 0, udp(1000, 1000, nil))), true},
		{"from beside an allowed prefix", v4(ipv4("10.42.4.1", "1.1.1.1", unix.IPPROTO_UDP, 0, 0, udp(1000, 1000, nil))), false},
		{"to another guest", udp4(them, 1000, 9090, nil), true},
		{"to the world", udp4("1.1.1.1", 1000, 53, nil), true},
		{"from the hub's address", v4(ipv4(hubIP, them, unix.IPPROTO_UDP, 0, 0, udp(1000, 1000, nil))), false},
		{"a fragment from a host's address", v4(ipv4(hostIP, them, unix.IPPROTO_UDP, 0, 100, make([]byte, 16))), false},
		{"to link-local addresses", udp4("169.254.169.254", 1000, 80, nil), false},

		{"DHCP", ask(guestMAC, 0, 0, whole), true},
		{"DHCP for another", ask(otherMAC, 0, 0, whole), false},
		{"DHCP for nobody", ask(make(net.HardwareAddr, 6), 0, 0, whole), false},
		{"DHCP for another behind IP options", ask(otherMAC, 2, 0, whole), false},
		{"DHCP behind IP options", ask(guestMAC, 2, 0, whole), true},
		{"DHCP without its address in the first fragment", ask(otherMAC, 0, moreFragments, 32), false},
		{"DHCP with its own address in the padding of the first fragment", append(ask(otherMAC, 0, moreFragments, 32), append(make([]byte, 4), guestMAC...)...), false},
		{"DHCP to the hub for another", v4(ipv4(me, hubIP, unix.IPPROTO_UDP, 0, 0, udp(68, 67, request(otherMAC)))), false},
		{"DHCP to the hub", v4(ipv4(me, hubIP, unix.IPPROTO_UDP, 0, 0, udp(68, 67, request(guestMAC)))), true},
		{"a DHCP server", udp4(all, 67, 68, nil), false},
		{"a DHCP server on another port", udp4(all, 6767, 68, nil), false},
		{"a DHCP relay", udp4(them, 67, 67, request(guestMAC)), false},
		{"a DHCPv6 server", v6(ipv6(mine, "ff02::1", unix.IPPROTO_UDP, udp(547, 546, nil))), false},
		{"a DHCPv6 server on another port", v6(ipv6(mine, "ff02::1", unix.IPPROTO_UDP, udp(1547, 546, nil))), false},
		{"DHCPv6", v6(ipv6(mine, "ff02::1:2", unix.IPPROTO_UDP, udp(546, 547, nil))), true},
		{"IPv6 from its link-local address", from6(mine), true},
		{"IPv6 from an address made of its MAC", from6(slaac), true},
		{"IPv6 from an allowed address", from6(cluster6), true},
		{"IPv6 from another guest's address", from6(theirs), false},
		{"IPv6 from a private address", from6(private), false},
		{"IPv6 from nobody", v6(ipv6("::", "ff02::2", unix.IPPROTO_ICMPV6, []byte{133, 0, 0, 0})), true},
		{"a neighbour that has its address", says6(mine, 136, mine), true},
		{"a neighbour that has an allowed address", says6(mine, 136, cluster6), true},
		{"a neighbour that has another's address", says6(mine, 136, theirs), false},
		{"a neighbour that asks for another", says6(mine, 135, theirs), true},
		{"a neighbour that asks as another", says6(theirs, 135, mine), false},
		{"a neighbour that wants its own address", says6("::", 135, mine), true},
		{"a neighbour that wants another's address", says6("::", 135, theirs), false},
		{"a router's redirect", v6(ipv6(mine, "ff02::1", unix.IPPROTO_ICMPV6, []byte{137, 0, 0, 0})), false},
		{"a router", v6(ipv6(mine, "ff02::1", unix.IPPROTO_ICMPV6, []byte{134, 0, 0, 0})), false},
		{"IPv6", v6(ipv6(mine, "ff02::1", unix.IPPROTO_ICMPV6, []byte{128, 0, 0, 0})), true},

		{"DNS at the hub", udp4(hubIP, 1000, 53, nil), true},
		{"images at the hub", v4(ipv4(me, hubIP, unix.IPPROTO_TCP, 0, 0, tcp(5000, 2))), true},
		{"ssh to the hub", v4(ipv4(me, hubIP, unix.IPPROTO_TCP, 0, 0, tcp(22, 2))), false},
		{"DNS at a host", udp4(hostIP, 1000, 53, nil), false},
		{"gRPC of a host", v4(ipv4(me, hostIP, unix.IPPROTO_TCP, 0, 0, tcp(9090, 2))), false},
		{"gRPC of a host behind IP options", v4(ipv4(me, hostIP, unix.IPPROTO_TCP, 3, 0, tcp(9090, 2))), false},
		{"gRPC of a host in fragments", v4(ipv4(me, hostIP, unix.IPPROTO_TCP, 0, moreFragments, tcp(9090, 2)[:8])), false},
		{"a host's metrics", v4(ipv4(me, hostIP, unix.IPPROTO_TCP, 0, 0, tcp(9092, 2))), false},
		{"an answer to a host", v4(ipv4(me, hostIP, unix.IPPROTO_TCP, 0, 0, tcp(40000, 0x12))), true},
		{"ping a host", v4(ipv4(me, hostIP, unix.IPPROTO_ICMP, 0, 0, []byte{8, 0, 0, 0})), true},
	}
	allowed := []netip.Prefix{netip.MustParsePrefix("10.42.0.0/22"), netip.MustParsePrefix(cluster + "/32"), netip.MustParsePrefix("10.42.1.0/24"), netip.MustParsePrefix(cluster6 + "/128")}
	by := func(t *testing.T, c card) {
		c.t = t
		if err := g.Set(c.name, nat.Guest{MAC: guestMAC, Allowed: allowed}); err != nil {
			t.Fatal(err)
		}
		world.send(append(acknowledge(guestMAC, me, time.Hour), "acknowledged"...))
		if !c.heard("acknowledged", 20*time.Second) {
			t.Fatal("the guest hears no answer of the DHCP server")
		}
		for i, one := range cases {
			mark := fmt.Sprintf("|%s %d|", c.name, i)
			c.send(append(bytes.Clone(one.frame), mark...))
			within := 20 * time.Second
			if !one.passes { // it would be there before what is sent after it
				c.send(ether(everyone, guestMAC, 0x88b5, []byte("after"+mark)))
				if world.heard(mark, within); world.heard("after"+mark, 20*time.Millisecond) {
					t.Errorf("%s passes", one.name)
				}
				continue
			}
			if !world.heard(mark, within) {
				t.Errorf("%s is dropped", one.name)
			}
		}
	}
	t.Run("tap", func(t *testing.T) { by(t, guest) })
	t.Run("macvtap", func(t *testing.T) {
		if _, err := link.EnsureMacvtap(guestMacvtap, "bond0.1000", guestMAC); err != nil {
			t.Fatal(err)
		}
		c := open(t, guestMacvtap, link.OpenMacvtap)
		if err := g.Set(guestMacvtap, nat.Guest{MAC: guestMAC}); err != nil {
			t.Fatal(err)
		}
		c.settle(guestMAC, world)
		by(t, c)
	})
	t.Run("without rules", func(t *testing.T) { // or the frames would show nothing
		if err := nat.Remove(nat.Table); err != nil {
			t.Fatal(err)
		}
		for i := range cases {
			cases[i].passes = true
		}
		by(t, guest)
	})
}

// TestBridgeLearnsNothingFromForgery: by a link-local frame neither, which no
// bridge passes on.
func TestBridgeLearnsNothingFromForgery(t *testing.T) {
	_, h, guest, _, world := segment(t)
	for _, to := range []net.HardwareAddr{everyone, {1, 0x80, 0xc2, 0, 0, 0xe}} {
		guest.send(ether(to, h.MAC, 0x88cc, make([]byte, 50)))
	}
	guest.send(ether(everyone, guestMAC, 0x88b5, []byte("after")))
	if !world.heard("after", 20*time.Second) {
		t.Fatal("the guest is not heard")
	}
	out, err := exec.Command("bridge", "fdb", "show", "dev", guestTap).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte(guestMAC.String()+" master ingot0 static")) || bytes.Contains(out, []byte(h.MAC.String())) {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestUnknownGuestIsMute: until the guard knows a guest, after it forgot it, and
// also where another guard begins.
func TestUnknownGuestIsMute(t *testing.T) {
	g, h, guest, other, world := segment(t)
	says := func(c card, mac net.HardwareAddr, within time.Duration) bool {
		c.send(ether(everyone, mac, 0x88b5, []byte("hello of "+c.name)))
		return world.heard("hello of "+c.name, within)
	}
	if err := g.Set(guestTap, nat.Guest{}); err != nil {
		t.Fatal(err)
	}
	if says(guest, guestMAC, 50*time.Millisecond) {
		t.Error("a guest that the guard has forgotten is heard")
	}
	g, err := nat.OpenGuard(h)
	if err != nil {
		t.Fatal(err)
	}
	if says(guest, guestMAC, 50*time.Millisecond) || !says(other, otherMAC, 20*time.Second) {
		t.Error("another guard does not go on where the earlier one ended")
	}
	if err := g.Set(guestTap, nat.Guest{MAC: worldMAC}); err != nil {
		t.Fatal(err)
	}
	if err := g.Set(guestTap, nat.Guest{MAC: guestMAC}); err != nil { // it has got another card
		t.Fatal(err)
	}
	if says(guest, worldMAC, 50*time.Millisecond) || !says(guest, guestMAC, 20*time.Second) {
		t.Error("a guest's new address does not replace its old one")
	}
}

// TestRogueDHCPServer: a real client takes an address from a server on any port, if
// it hears of it.
func TestRogueDHCPServer(t *testing.T) {
	need.Binary(t, "busybox")
	_, _, guest, _, _ := segment(t)
	ns := newNamespace(t)
	ip(t, "link add client0 type veth peer name eth0 netns "+ns)
	ip(t, "link set client0 master ingot0 up")
	ip(t, "-n "+ns+" link set eth0 up")
	obtains := func(tries string) bool {
		done := make(chan bool)
		go func() { // the guest, as a server on another port
			defer close(done)
			frame := make([]byte, 2048)
			guest.file.SetReadDeadline(time.Now().Add(30 * time.Second))
			for {
				n, err := guest.file.Read(frame)
				if err != nil {
					return
				}
				const headers = 10 + 14 + 20 + 8
				if n < headers || frame[10+12] != 8 || frame[10+12+1] != 0 {
					continue
				}
				m, err := dhcpv4.FromBytes(frame[headers:n])
				if err != nil {
					continue
				}
				kind := dhcpv4.MessageTypeOffer
				if m.MessageType() == dhcpv4.MessageTypeRequest {
					kind = dhcpv4.MessageTypeAck
				}
				answer, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IP{192, 168, 10, 66}),
					dhcpv4.WithServerIP(net.IP{192, 168, 10, 30}), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{192, 168, 10, 30})), dhcpv4.WithLeaseTime(600))
				if err != nil {
					return
				}
				packet := ipv4("192.168.10.30", "255.255.255.255", unix.IPPROTO_UDP, 0, 0, udp(6767, 68, answer.ToBytes()))
				guest.file.Write(append(make([]byte, 10), ether(everyone, guestMAC, unix.ETH_P_IP, packet)...))
			}
		}()
		out, err := exec.Command("ip", "netns", "exec", ns, "busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", tries, "-T", "1", "-s", "/bin/true").CombinedOutput()
		guest.file.SetReadDeadline(time.Now())
		<-done
		t.Logf("%v\n%s", err, out)
		return err == nil
	}
	if obtains("2") {
		t.Error("the client believes a guest")
	}
	if err := nat.Remove(nat.Table); err != nil { // without the rules it does
		t.Fatal(err)
	}
	if !obtains("10") {
		t.Error("the client gets nothing also without the rules: this test shows nothing")
	}
}

var namespaces int

// newNamespace makes a network namespace that has a name until the test ends.
func newNamespace(t *testing.T) string {
	t.Helper()
	namespaces++
	name := fmt.Sprintf("ingot-nat-test-%d-%d", os.Getpid(), namespaces)
	ip(t, "netns add "+name)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	ip(t, "-n "+name+" link set lo up")
	return name
}
