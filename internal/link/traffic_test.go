package link

import (
	"bytes"
	"testing"

	"ingot/internal/need"
)

// What goes by a tap and by a macvtap is counted, from this machine's side.
func TestTraffic(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	if _, err := EnsureVeth("parent", "peer", nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Remove("parent") })
	for _, name := range []string{"parent", "peer"} {
		if err := Up(name); err != nil {
			t.Fatal(err)
		}
	}
	mac := MAC("traffic")
	tap, err := EnsureTap("tap-traffic", Tap{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Remove(tap.Name) })
	macvtap, err := EnsureMacvtap("macvtap-traffic", "parent", mac)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Remove(macvtap.Name) })
	const frames, size = 7, 100
	frame := append(make([]byte, 10), bytes.Repeat([]byte{0xff}, 6)...) // the virtio-net header, and to everybody
	frame = append(append(frame, mac...), 0x88, 0xb5)
	frame = append(frame, make([]byte, 10+size-len(frame))...)
	before, err := ReadTraffic()
	if err != nil {
		t.Fatal(err)
	}
	open, err := OpenTap(tap.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	openMacvtap, err := OpenMacvtap(macvtap.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer openMacvtap.Close()
	for range frames {
		for _, f := range []interface{ Write([]byte) (int, error) }{open, openMacvtap} {
			if _, err := f.Write(frame); err != nil {
				t.Fatal(err)
			}
		}
	}
	after, err := ReadTraffic()
	if err != nil {
		t.Fatal(err)
	}
	// The kernel itself may have sent something to either (IPv6's neighbour discovery).
	if was, is := before[tap.Index], after[tap.Index]; is.ReceivedPackets-was.ReceivedPackets != frames || is.ReceivedBytes-was.ReceivedBytes != frames*size {
		t.Errorf("the tap: %+v, then %+v", was, is)
	}
	if was, is := before[macvtap.Index], after[macvtap.Index]; is.SentPackets-was.SentPackets < frames || is.SentBytes-was.SentBytes < frames*size {
		t.Errorf("the macvtap: %+v, then %+v", was, is)
	}
	if is := after[macvtap.Index]; is.ReceivedPackets >= frames {
		t.Errorf("the macvtap has received %+v", is)
	}
	links, err := List()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if _, ok := after[l.Index]; !ok {
			t.Errorf("nothing is known of %s", l.Name)
		}
	}
}
