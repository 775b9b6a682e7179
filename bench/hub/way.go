package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"time"
)

// byHand is what does the same as the hub's rules for who goes out.
const byHand = `sysctl -qw net.ipv4.ip_forward=1
nft -f - <<END
table ip byhand {
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		iifname segment oifname uplink accept
	}
	chain postrouting {
		type nat hook postrouting priority srcnat;
		ip saddr 10.0.0.0/12 oifname uplink masquerade
	}
}
END`

// oneByOne has the kernel pass each packet on by itself, and not many as one.
const oneByOne = `set -e
ip netns exec clients ethtool -K eth0 tso off gso off gro off
ip netns exec world ethtool -K eth0 tso off gso off gro off
ethtool -K segment gro off; ethtool -K uplink gro off`

// way compares what goes from the segment out by the uplink, masqueraded: through a hub
// that runs, and by rules that one writes by hand, without a hub.
func (b *bench) way(ctx context.Context) error {
	far, err := b.start("iperf3")
	if err != nil {
		return err
	}
	defer far.stop()
	for _, kind := range []struct{ name, prepare string }{{"iperf3", "true"}, {"iperf3, packets one by one", oneByOne}} {
		if err := sh(kind.prepare); err != nil {
			return err
		}
		var ours, hand []float64
		throughHub := func() error {
			return b.with(ctx, "ingot", offers, func(s *server) error {
				if err := s.await(ctx, settled); err != nil {
					return err
				}
				return iperf(ctx, &ours)
			})
		}
		throughRules := func() error {
			if err := sh(byHand); err != nil {
				return err
			}
			defer sh("nft flush ruleset")
			return iperf(ctx, &hand)
		}
		// What else the machine does varies more than the two: none is always the first.
		for range 4 {
			for _, f := range []func() error{throughHub, throughRules, throughRules, throughHub} {
				if err := f(); err != nil {
					return err
				}
			}
		}
		show(kind.name, "through the hub %.1f Gbit/s, by rules by hand %.1f Gbit/s", median(ours), median(hand))
		b.judge(kind.name+" against rules by hand", median(ours)/median(hand), 0.98, 1, "x")
	}
	return nil
}

// settled says whether a hub that has begun has no socket open any more by which it looks for
// other DHCP servers, and for which the kernel copies each packet (ETH_P_IP).
func settled(ctx context.Context) error {
	sockets, err := os.ReadFile("/proc/net/packet")
	if err == nil && regexp.MustCompile(`(?m)^\S+ +\d+ +\d+ +0800 `).Match(sockets) {
		err = errors.New("it looks for other DHCP servers")
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	return err
}

// iperf adds to rates what arrives, in Gbit/s.
func iperf(ctx context.Context, rates *[]float64) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	out, err := client(ctx, "iperf3", "-J", "-t", "2", "--connect-timeout", "3000", "-c", worldAddr).CombinedOutput()
	if err != nil {
		return fmt.Errorf("iperf3: %w\n%s", err, out)
	}
	var r struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return fmt.Errorf("iperf3: %w", err)
	}
	*rates = append(*rates, r.End.Received.Rate/1e9)
	return nil
}
