// Command tailnet is a tailnet for tests: the control server of tailscale's own tests,
// and a relay. It does what lines of its standard input say, and ends with that.
package main

import (
	"bufio"
	"crypto/tls"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

func main() {
	address := flag.String("address", "", "where to listen: for HTTP at port 8080")
	authKey := flag.String("auth-key", "", "the one that lets nodes in")
	flag.Parse()
	if err := serve(*address, *authKey); err != nil {
		log.Fatal(err)
	}
}

func serve(address, authKey string) error {
	relay, err := serveRelay(address)
	if err != nil {
		return err
	}
	s := &testcontrol.Server{
		Logf: log.Printf, DERPMap: relay, RequireAuthKey: authKey, AllNodesSameUser: true, AllOnline: true,
		MagicDNSDomain: "tail0000.example", ExplicitBaseURL: "http://" + address + ":8080",
	}
	l, err := net.Listen("tcp", net.JoinHostPort(address, "8080"))
	if err != nil {
		return err
	}
	go func() { log.Fatal(http.Serve(l, s)) }()
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if err := do(s, strings.Fields(lines.Text())); err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("ok")
		}
	}
	return lines.Err()
}

// do is what an administrator does: `approve HOSTNAME [PREFIX]`, of which none takes all
// approvals back, and `open`: without it this server wants the key of those too who are
// in already, which others don't.
func do(s *testcontrol.Server, words []string) error {
	if len(words) == 1 && words[0] == "open" {
		s.RequireAuthKey = ""
		return nil
	}
	if len(words) < 2 || words[0] != "approve" {
		return fmt.Errorf("what is %q?", words)
	}
	var routes []netip.Prefix
	for _, text := range words[2:] {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return err
		}
		routes = append(routes, p)
	}
	for _, n := range s.AllNodes() {
		if n.Hostinfo.Hostname() == words[1] {
			s.SetSubnetRoutes(n.Key, routes)
			return nil
		}
	}
	return fmt.Errorf("no node is called %s", words[1])
}

// serveRelay is a DERP server, and STUN, by which nodes learn where they are.
func serveRelay(address string) (*tailcfg.DERPMap, error) {
	d := derpserver.New(key.NewNode(), log.Printf)
	l, err := net.Listen("tcp", net.JoinHostPort(address, "8443"))
	if err != nil {
		return nil, err
	}
	web := httptest.NewUnstartedServer(derpserver.Handler(d))
	web.Listener.Close()
	web.Listener = l
	web.Config.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){} // DERP is no HTTP/2
	web.StartTLS()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(address), Port: 3478})
	if err != nil {
		return nil, err
	}
	go answerSTUN(c)
	return &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, RegionCode: "test", Nodes: []*tailcfg.DERPNode{{
		Name: "t1", RegionID: 1, HostName: address, IPv4: address, IPv6: "none", STUNPort: 3478, DERPPort: 8443, InsecureForTests: true, STUNTestIP: address,
	}}}}}, nil
}

func answerSTUN(c *net.UDPConn) {
	b := make([]byte, 1500)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if id, err := stun.ParseBindingRequest(b[:n]); err == nil {
			c.WriteToUDPAddrPort(stun.Response(id, from), from)
		}
	}
}
