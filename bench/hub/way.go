package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

const byHub = "nft -f /run/hub.nft"

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

// way compares what goes from the segment out by the uplink, masqueraded: by the
// rules that a hub has set, and by those that one writes by hand. The hub runs all
// the time, so that only the rules differ; nft gives it its own back.
func (b *bench) way(ctx context.Context) error {
	far, err := b.start("iperf3")
	if err != nil {
		return err
	}
	defer far.stop()
	rates := map[string][]float64{}
	err = b.with(ctx, "ingot", offers, func(*server) error {
		if err := sh("nft list ruleset >/run/hub.nft && grep -q masquerade /run/hub.nft"); err != nil {
			return err
		}
		// What else the machine does varies more than the rules: none is always the first.
		for _, rules := range slices.Repeat([]string{byHub, byHand, byHand, byHub}, 4) {
			if err := sh("set -e; nft flush ruleset; " + rules); err != nil {
				return err
			}
			rate, err := iperf(ctx)
			if err != nil {
				return err
			}
			rates[rules] = append(rates[rules], rate)
		}
		return nil
	})
	if err != nil {
		return err
	}
	ours, hand := median(rates[byHub]), median(rates[byHand])
	show("iperf3 out", "by the hub's rules %.1f Gbit/s, by rules by hand %.1f Gbit/s", ours, hand)
	b.judge("iperf3 against rules by hand", ours/hand, 0.98, 1, "x")
	return nil
}

// iperf is what arrives, in Gbit/s.
func iperf(ctx context.Context) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	out, err := client(ctx, "iperf3", "-J", "-t", "2", "--connect-timeout", "3000", "-c", worldAddr).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("iperf3: %w\n%s", err, out)
	}
	var r struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	err = json.Unmarshal(out, &r)
	return r.End.Received.Rate / 1e9, err
}
