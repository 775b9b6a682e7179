package dhcp

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Whom an address is kept for by its client identifier is shown as such.
func TestKeptByClientID(t *testing.T) {
	s, _ := table(t, func(c *Config) {
		c.Reservations = []Reservation{{IP: a("192.168.10.11"), ClientID: []byte("\x01two")}}
	})
	if l := s.Leases(); len(l) != 1 || l[0].State != Reserved || !l[0].Reserved || string(l[0].ClientID) != "\x01two" {
		t.Errorf("at first %+v", l)
	}
	if ip := ack(t, s, 9, dhcpv4.WithOption(dhcpv4.OptClientIdentifier([]byte("\x01two")))); ip != "192.168.10.11" {
		t.Errorf("it has %s", ip)
	}
	if ip := ack(t, s, 8); ip != "192.168.10.26" {
		t.Errorf("another one has %s", ip)
	}
	if l := s.Leases(); len(l) != 2 || l[0].State != Active || !l[0].Reserved || l[1].Reserved {
		t.Errorf("then %+v", l)
	}
}

// What the configuration keeps for a client goes before what somebody has reserved for it.
func TestConfigurationGoesBeforeReserve(t *testing.T) {
	segment(t)
	c := config(t)
	s, stop := start(t, c)
	for ip, r := range map[string]Reservation{"192.168.10.60": {MAC: mac(1)}, "192.168.10.61": {MicroVM: "default/web"}, "192.168.10.62": {MAC: mac(2)}} {
		r.IP = a(ip)
		if _, err := s.Reserve(r); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	c.Reservations = []Reservation{{IP: a("192.168.10.70"), MAC: mac(1)}, {IP: a("192.168.10.71"), MicroVM: "default/web"}}
	for range 2 { // also when the log has been written anew
		s, stop = start(t, c)
		var kept []string
		for _, l := range s.Leases() {
			kept = append(kept, l.IP.String())
		}
		if diff := cmp.Diff([]string{"192.168.10.62", "192.168.10.70", "192.168.10.71"}, kept); diff != "" {
			t.Error(diff)
		}
		stop()
	}
}
