package dhcp

import (
	"testing"

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
