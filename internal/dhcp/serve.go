package dhcp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	serverPort = 67
	clientPort = 68
)

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	if err := s.run(ctx); err != nil {
		return s.fail(err)
	}
	return nil
}

func (s *Server) run(ctx context.Context) error {
	iface, err := net.InterfaceByName(s.c.Interface)
	if err != nil {
		return fmt.Errorf("serve DHCP on %s: %w", s.c.Interface, err)
	}
	j, err := openJournal(s.c.LeaseFile, s.content)
	if err != nil {
		return err
	}
	if err := s.export(); err != nil {
		return err
	}
	in, err := listen(s.c.Interface)
	if err != nil {
		return fmt.Errorf("serve DHCP on %s: %w", s.c.Interface, err)
	}
	defer in.Close()
	out, err := openSender(iface, s.c.Server)
	if err != nil {
		return fmt.Errorf("serve DHCP on %s: %w", s.c.Interface, err)
	}
	defer out.Close()
	s.mu.Lock()
	s.log, s.serving = j, true
	count := len(s.leases)
	s.mu.Unlock()
	where := fmt.Sprintf("LPF/%s/%s/%s", s.c.Interface, iface.HardwareAddr, s.c.Subnet)
	s.c.Log.Info(fmt.Sprintf("Wrote %d leases to leases file.", count))
	s.c.Log.Info("Listening on " + where)
	s.c.Log.Info("Sending on   " + where)
	s.c.Log.Info("Server starting service.")
	close(s.ready)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return j.run(ctx) })
	group.Go(func() error { return s.receive(ctx, in, out) })
	return group.Wait()
}

// listen opens the server's port on one interface only.
func listen(iface string) (*net.UDPConn, error) {
	var control error
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		err := c.Control(func(fd uintptr) {
			control = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20),
				unix.BindToDevice(int(fd), iface),
			)
		})
		return errors.Join(err, control)
	}}
	c, err := lc.ListenPacket(context.Background(), "udp4", fmt.Sprintf("0.0.0.0:%d", serverPort))
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func (s *Server) receive(ctx context.Context, in *net.UDPConn, out *sender) error {
	stop := context.AfterFunc(ctx, func() { in.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buffer := make([]byte, 4096)
	for {
		n, _, err := in.ReadFromUDPAddrPort(buffer)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.ENETDOWN) {
			continue // the interface is down for a moment
		}
		if err != nil {
			return fmt.Errorf("receive DHCP: %w", err)
		}
		request, err := dhcpv4.FromBytes(buffer[:n])
		if err != nil || request.OpCode != dhcpv4.OpcodeBootRequest || len(request.ClientHWAddr) != 6 {
			continue
		}
		answer, text, compact := s.handle(request)
		send := func() {
			if answer == nil {
				return
			}
			if err := out.send(request, answer); err != nil {
				s.c.Log.Warn("send answer", "mac", request.ClientHWAddr, "err", err)
			}
		}
		if text == nil {
			send()
			continue
		}
		s.log.append(entry{text: text, compact: compact, done: func(err error) {
			if err == nil {
				send()
			}
		}})
	}
}

// handle changes the table and returns the answer, and what must be on disk
// before it leaves.
func (s *Server) handle(m *dhcpv4.DHCPv4) (answer *dhcpv4.DHCPv4, text []byte, compact bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return s.discover(m), nil, false
	case dhcpv4.MessageTypeRequest:
		answer, text = s.request(m)
		return answer, text, false
	case dhcpv4.MessageTypeRelease:
		l := s.leases[addr(m.ClientIPAddr)]
		if l == nil || !bytes.Equal(l.MAC, m.ClientHWAddr) || s.current(l) != Active {
			return nil, nil, false
		}
		return nil, s.release(l), true
	case dhcpv4.MessageTypeDecline:
		return nil, s.decline(m), true
	case dhcpv4.MessageTypeInform:
		return s.reply(m, dhcpv4.MessageTypeAck, netip.Addr{}, 0), nil, false
	}
	return nil, nil, false
}

func (s *Server) discover(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	ip, ok := s.choose(m.ClientHWAddr, addr(m.RequestedIPAddress()))
	if !ok {
		if !s.warned {
			s.c.Log.Error("no free address is left", "mac", m.ClientHWAddr, "range", fmt.Sprintf("%s - %s", s.c.First, s.c.Last))
			s.warned = true
		}
		return nil
	}
	s.warned = false
	now := s.c.Now()
	if l := s.leases[ip]; l == nil || s.current(l) != Active {
		s.put(&Lease{IP: ip, MAC: slices.Clone(m.ClientHWAddr), Hostname: hostname(m), Starts: now, Ends: now.Add(offerTime), State: Offered})
	}
	return s.reply(m, dhcpv4.MessageTypeOffer, ip, s.lifetime(m))
}

// request answers the four kinds of REQUEST of RFC 2131, section 4.3.2.
func (s *Server) request(m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, []byte) {
	server := addr(m.ServerIdentifier())
	if server.IsValid() && server != s.c.Server {
		// The client took another server's offer: ours is free again.
		if l := s.byMAC[string(m.ClientHWAddr)]; l != nil && l.State == Offered {
			delete(s.leases, l.IP)
			delete(s.byMAC, string(m.ClientHWAddr))
			s.next = s.c.First
		}
		return nil, nil
	}
	ip := addr(m.RequestedIPAddress()) // selecting, init-reboot
	if !ip.IsValid() {
		ip = addr(m.ClientIPAddr) // renewing, rebinding
	}
	kept, reserved := s.reserved[string(m.ClientHWAddr)]
	if !ip.IsValid() || reserved && ip != kept || !s.free(ip, m.ClientHWAddr) {
		s.c.Log.Info("refused", "mac", m.ClientHWAddr, "ip", ip)
		return s.reply(m, dhcpv4.MessageTypeNak, netip.Addr{}, 0), nil
	}
	life := s.lifetime(m)
	now := s.c.Now()
	l := &Lease{
		IP: ip, MAC: slices.Clone(m.ClientHWAddr), ClientID: slices.Clone(m.GetOneOption(dhcpv4.OptionClientIdentifier)),
		Hostname: hostname(m), Starts: now, Ends: now.Add(life), State: Active,
	}
	if old := s.leases[ip]; old != nil && bytes.Equal(old.MAC, l.MAC) && l.Hostname == "" {
		l.Hostname = old.Hostname
	}
	s.put(l)
	return s.reply(m, dhcpv4.MessageTypeAck, ip, life), formatLease(*l)
}

func (s *Server) decline(m *dhcpv4.DHCPv4) []byte {
	ip := addr(m.RequestedIPAddress())
	l := s.leases[ip]
	if l == nil || !bytes.Equal(l.MAC, m.ClientHWAddr) {
		return nil
	}
	s.c.Log.Warn("a client found its address taken", "mac", m.ClientHWAddr, "ip", ip)
	taken := *l
	taken.State, taken.Ends = Declined, s.c.Now().Add(declineTime)
	s.put(&taken)
	return formatLease(taken)
}

// lifetime is what the client asks for, within our limits.
func (s *Server) lifetime(m *dhcpv4.DHCPv4) time.Duration {
	return min(max(m.IPAddressLeaseTime(s.c.DefaultLease), s.c.MinLease), s.c.MaxLease)
}

func (s *Server) reply(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, ip netip.Addr, life time.Duration) *dhcpv4.DHCPv4 {
	modifiers := []dhcpv4.Modifier{
		dhcpv4.WithReply(m), dhcpv4.WithMessageType(kind),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(s.c.Server.AsSlice())),
	}
	if kind == dhcpv4.MessageTypeNak {
		modifiers = append(modifiers, dhcpv4.WithBroadcast(true))
	} else {
		modifiers = append(modifiers,
			dhcpv4.WithServerIP(s.c.Server.AsSlice()),
			dhcpv4.WithNetmask(net.CIDRMask(s.c.Subnet.Bits(), 32)),
			dhcpv4.WithRouter(s.c.Router.AsSlice()),
			dhcpv4.WithDNS(slicesOf(s.c.DNS)...))
		if s.c.Domain != "" {
			modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptDomainName(s.c.Domain)))
		}
	}
	if ip.IsValid() {
		modifiers = append(modifiers, dhcpv4.WithYourIP(ip.AsSlice()),
			dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(life)),
			dhcpv4.WithOption(dhcpv4.OptRenewTimeValue(life/2)),
			dhcpv4.WithOption(dhcpv4.OptRebindingTimeValue(life*7/8)))
	}
	answer, err := dhcpv4.New(modifiers...)
	if err != nil {
		s.c.Log.Error("make answer", "err", err)
		return nil
	}
	if kind == dhcpv4.MessageTypeAck {
		answer.ClientIPAddr = m.ClientIPAddr
	}
	return answer
}

func slicesOf(addrs []netip.Addr) []net.IP {
	var ips []net.IP
	for _, a := range addrs {
		ips = append(ips, a.AsSlice())
	}
	return ips
}

// hostname is option 12, as far as it can stand in a host name.
func hostname(m *dhcpv4.DHCPv4) string {
	name := m.HostName()
	if len(name) > 63 {
		name = name[:63]
	}
	return string(bytes.Map(func(r rune) rune {
		if r > ' ' && r <= '~' && r != '"' {
			return r
		}
		return -1
	}, []byte(name)))
}

func addr(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

// content is the whole log as it should be.
func (s *Server) content() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b bytes.Buffer
	b.WriteString(header)
	macs := make([]string, 0, len(s.reserved))
	for mac := range s.reserved {
		macs = append(macs, mac)
	}
	slices.Sort(macs)
	for _, mac := range macs {
		b.Write(formatReservation(net.HardwareAddr(mac), s.reserved[mac]))
	}
	var all []*Lease
	for _, l := range s.leases {
		// Scripts show released leases as if they were active: leave them out, and
		// with them what only this process remembers of them.
		if l.State == Active {
			all = append(all, l)
		}
	}
	slices.SortFunc(all, func(x, y *Lease) int { return x.IP.Compare(y.IP) })
	for _, l := range all {
		b.Write(formatLease(*l))
	}
	return b.Bytes()
}

// export writes the configuration the way isc-dhcp-server has it, for people and
// scripts that look there.
func (s *Server) export() error {
	for path, text := range map[string]string{
		s.c.ConfigFile:   exportConfig(s.c),
		s.c.DefaultsFile: fmt.Sprintf("INTERFACESv4=%q\n", s.c.Interface),
	} {
		if path == "" {
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	return nil
}

func exportConfig(c Config) string {
	var dns string
	for i, a := range c.DNS {
		if i > 0 {
			dns += ", "
		}
		dns += a.String()
	}
	mask := net.CIDRMask(c.Subnet.Bits(), 32)
	text := fmt.Sprintf("default-lease-time %d;\nmax-lease-time %d;\nauthoritative;\n\nsubnet %s netmask %s {\n  range %s %s;\n  option routers %s;\n",
		int(c.DefaultLease.Seconds()), int(c.MaxLease.Seconds()), c.Subnet.Masked().Addr(), net.IP(mask), c.First, c.Last, c.Router)
	if dns != "" {
		text += fmt.Sprintf("  option domain-name-servers %s;\n", dns)
	}
	return text + "}\n"
}

// sender puts answers on the wire: as whole frames, since a client without an
// address can't be reached by the kernel's routes.
type sender struct {
	fd     int
	iface  *net.Interface
	source netip.Addr
}

func openSender(iface *net.Interface, source netip.Addr) (*sender, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	return &sender{fd: fd, iface: iface, source: source}, nil
}

func (o *sender) Close() error { return unix.Close(o.fd) }

// send answers as RFC 2131, section 4.1, has it.
func (o *sender) send(request, answer *dhcpv4.DHCPv4) error {
	to, mac := netip.AddrFrom4([4]byte{255, 255, 255, 255}), net.HardwareAddr{255, 255, 255, 255, 255, 255}
	if !answer.IsBroadcast() {
		mac = request.ClientHWAddr
		to = addr(request.ClientIPAddr)
		if !to.IsValid() {
			to = addr(answer.YourIPAddr)
		}
	}
	frame := frame(o.iface.HardwareAddr, mac, o.source, to, answer.ToBytes())
	return unix.Sendto(o.fd, frame, 0, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: o.iface.Index, Halen: 6, Addr: [8]byte(append(slices.Clone(mac), 0, 0))})
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// frame wraps a message in UDP (RFC 768), IPv4 (RFC 791) and Ethernet.
func frame(from, to net.HardwareAddr, source, destination netip.Addr, message []byte) []byte {
	const ethernet, ip, udp = 14, 20, 8
	b := make([]byte, ethernet+ip+udp, ethernet+ip+udp+len(message))
	copy(b, to)
	copy(b[6:], from)
	be := binary.BigEndian
	be.PutUint16(b[12:], unix.ETH_P_IP)
	h := b[ethernet:]
	h[0], h[8], h[9] = 0x45, 64, unix.IPPROTO_UDP
	be.PutUint16(h[2:], uint16(ip+udp+len(message)))
	copy(h[12:], source.AsSlice())
	copy(h[16:], destination.AsSlice())
	be.PutUint16(h[10:], ^sum(0, h[:ip]))
	u := h[ip:]
	be.PutUint16(u, serverPort)
	be.PutUint16(u[2:], clientPort)
	be.PutUint16(u[4:], uint16(udp+len(message)))
	b = append(b, message...)
	pseudo := sum(0, h[12:20])
	pseudo = sum(uint32(pseudo)+unix.IPPROTO_UDP+uint32(udp+len(message)), b[ethernet+ip:])
	checksum := ^pseudo
	if checksum == 0 {
		checksum = 0xffff // 0 would mean that there is none
	}
	be.PutUint16(b[ethernet+ip+6:], checksum)
	return b
}

// sum is the one's complement sum of RFC 1071.
func sum(start uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		start += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	for start > 0xffff {
		start = start&0xffff + start>>16
	}
	return uint16(start)
}
