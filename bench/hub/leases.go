package main

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const leaseCount = 60000

// leases measures servers that start with many leases: until they offer, and what
// memory they have once they have worked.
func (b *bench) leases(ctx context.Context) error {
	took, rss, anon := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for range rounds {
		for _, name := range []string{"ingot", "kea"} {
			if err := b.empty(); err != nil {
				return err
			}
			if err := b.writeLeases(name); err != nil {
				return err
			}
			began := time.Now()
			s, err := b.start(name)
			if err != nil {
				return err
			}
			err = s.await(ctx, offers)
			took[name] = append(took[name], time.Since(began).Seconds())
			if err == nil {
				_, err = perfdhcp(ctx, "-p", "1", "-r", "1000")
			}
			all, own := s.memory()
			rss[name], anon[name] = append(rss[name], all), append(anon[name], own)
			s.stop()
			if err != nil {
				return err
			}
		}
	}
	what := fmt.Sprint(leaseCount, " leases: ")
	show(what+"of kea", "offers after %.2f s, RSS %.1f MB, of it its own %.1f MB", median(took["kea"]), median(rss["kea"]), median(anon["kea"]))
	show(what+"of ingot, its own", "%.1f MB, the rest is its program", median(anon["ingot"]))
	b.judge(what+"RSS", median(rss["ingot"]), 60, 30, " MB")
	b.judge(what+"start to offer", median(took["ingot"]), 1, 0.3, " s")
	return nil
}

// memory is what it has in megabytes, all of it and the part that is its own.
func (s *server) memory() (all, own float64) {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		switch key {
		case "VmRSS":
			fmt.Sscan(value, &all) // kB
		case "RssAnon":
			fmt.Sscan(value, &own)
		}
	}
	return all / 1024, own / 1024
}

// writeLeases writes what a server finds when it starts.
func (b *bench) writeLeases(name string) error {
	file := map[string]string{"ingot": "dhcpd.leases", "kea": "kea.csv"}[name]
	f, err := os.Create(filepath.Join("/var/lib/dhcp", file))
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	if name == "kea" {
		fmt.Fprintln(w, "address,hwaddr,client_id,valid_lifetime,expire,subnet_id,fqdn_fwd,fqdn_rev,hostname,state,user_context")
	}
	begins, ip := time.Now().UTC(), netip.MustParseAddr(rangeFirst)
	ends := begins.Add(10 * time.Minute)
	for i := range leaseCount {
		mac := fmt.Sprintf("02:00:00:%02x:%02x:%02x", i>>16, i>>8&255, i&255)
		if name == "kea" {
			fmt.Fprintf(w, "%s,%s,01:%s,600,%d,1,0,0,microvm-%d,0,\n", ip, mac, mac, ends.Unix(), i)
		} else {
			const form = "2006/01/02 15:04:05"
			fmt.Fprintf(w, "lease %s {\n  starts %d %s;\n  ends %d %s;\n  binding state active;\n  hardware ethernet %s;\n  client-hostname \"microvm-%d\";\n}\n",
				ip, begins.Weekday(), begins.Format(form), ends.Weekday(), ends.Format(form), mac, i)
		}
		ip = ip.Next()
	}
	return w.Flush()
}
