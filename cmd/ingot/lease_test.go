package main

import (
	"strings"
	"testing"

	ingotv1 "ingot/api/ingot/v1"
)

// A list says for whom an address is kept, whatever the client is known by.
func TestLeaseTable(t *testing.T) {
	var b strings.Builder
	var views []leaseView
	for _, l := range []*ingotv1.Lease{
		{Ip: "192.168.10.60", State: "reserved", Reserved: true, ClientId: []byte{1, 0xa}},
		{Ip: "192.168.10.61", State: "reserved", Reserved: true, Mac: "02:00:00:00:00:01"},
		{Ip: "192.168.10.62", State: "reserved", Reserved: true, Microvm: "default/web"},
		{Ip: "192.168.10.63", State: "active", Reserved: true, Mac: "02:00:00:00:00:02", ClientId: []byte{1, 0xb}},
		{Ip: "192.168.10.64", State: "active", Mac: "02:00:00:00:00:03", ClientId: []byte{1, 0xc}},
	} {
		views = append(views, viewLease(l))
	}
	if err := leaseTable(&b, views); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(b.String()) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	if want := []string{
		"IP MAC HOSTNAME STATE ENDS(UTC) RESERVED MICROVM",
		"192.168.10.60 - - reserved - id:01:0a -", "192.168.10.61 02:00:00:00:00:01 - reserved - yes -",
		"192.168.10.62 - - reserved - yes default/web", "192.168.10.63 02:00:00:00:00:02 - active - yes -",
		"192.168.10.64 02:00:00:00:00:03 - active - - -",
	}; strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
}

// What a microVM has is not what is kept for it until it has asked.
func TestKeptIsNotLeased(t *testing.T) {
	const card = "02:00:00:00:00:01"
	has := &ingotv1.Lease{Ip: "192.168.10.30", State: "active", Mac: card}
	kept := &ingotv1.Lease{Ip: "192.168.10.61", State: "reserved", Reserved: true, Mac: card}
	for _, all := range [][]*ingotv1.Lease{{has, kept}, {kept, has}} {
		if l := activeByMAC(all)[card]; l != has {
			t.Errorf("it has %v", l)
		}
	}
	if l := activeByMAC([]*ingotv1.Lease{kept})[card]; l != nil {
		t.Errorf("before it has asked, it has %v", l)
	}
}
