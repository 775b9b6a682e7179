package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// perfRates are the rates at which exchanges are begun: what a server can do is
// between those that it keeps and those that it can't; 0 is as fast as perfdhcp can.
var perfRates = []int{2000, 8000, 12000, 0}

// exchanges compares how many exchanges of four messages a second there are, each
// server at the rate that is best for it.
func (b *bench) exchanges(ctx context.Context) error {
	found := map[string][]float64{}
	for range rounds {
		for _, name := range []string{"ingot", "kea", "isc", "answers"} {
			var best float64
			err := b.with(ctx, name, offers, func(*server) error {
				for _, rate := range perfRates {
					r, err := perfdhcp(ctx, "-p", "2", "-r", strconv.Itoa(rate))
					if err != nil {
						return err
					}
					best = max(best, r.rate)
				}
				return nil
			})
			if err != nil {
				return err
			}
			found[name] = append(found[name], best)
		}
	}
	ours, kea, ceiling := median(found["ingot"]), median(found["kea"]), median(found["answers"])
	show("DHCP exchanges/s", "ingot %.0f, kea %.0f, isc %.0f; the most that perfdhcp can count here %.0f", ours, kea, median(found["isc"]), ceiling)
	// Where perfdhcp can count no more than some times kea's, no more is asked for.
	most := ceiling / kea
	show("of what perfdhcp can count", "ingot %.2f, kea %.2f", ours/ceiling, kea/ceiling)
	b.judge("exchanges against kea, which does not sync", ours/kea, min(1.2, 0.95*most), min(2, most), "x")
	b.judge("exchanges against isc-dhcp-server", ours/median(found["isc"]), 10, 20, "x")
	return b.delays(ctx, int(ours/2))
}

// delays measures the time from a REQUEST to its ACK, and of a write that is made
// durable, which is each ACK's least: with nothing beside it, and beside the same load.
func (b *bench) delays(ctx context.Context, rate int) error {
	var ours, generator, alone, beside []float64
	p99 := func(to *[]float64, all []float64) { *to = append(*to, percentile(all, 99)) }
	for range rounds {
		err := b.with(ctx, "ingot", offers, func(*server) error {
			r, err := perfdhcp(ctx, "-p", "2", "-x", "t", "-r", strconv.Itoa(rate))
			p99(&ours, r.delays)
			return err
		})
		if err != nil {
			return err
		}
		err = b.with(ctx, "answers", offers, func(*server) error {
			var group errgroup.Group
			group.Go(func() error {
				all, err := b.syncs(2 * time.Second)
				p99(&beside, all)
				return err
			})
			r, err := perfdhcp(ctx, "-p", "2", "-x", "t", "-r", strconv.Itoa(rate))
			p99(&generator, r.delays)
			return errors.Join(err, group.Wait())
		})
		if err != nil {
			return err
		}
		all, err := b.syncs(time.Second)
		if err != nil {
			return err
		}
		p99(&alone, all)
	}
	show("p99 of a write of 250 B and fdatasync", "%.2f ms; %.2f ms beside the load", median(alone), median(beside))
	show(fmt.Sprintf("p99 to the ACK at %d exchanges/s", rate), "%.2f ms; %.2f ms of a server that only answers", median(ours), median(generator))
	show("p99 of an ACK against fdatasync beside the load", "%.2fx", median(ours)/median(beside))
	b.judge("p99 of an ACK against that of fdatasync", median(ours)/median(alone), 3, 1.5, "x")
	return nil
}

// syncs is how long writes of a lease's size take in milliseconds, each made durable,
// one after the other.
func (b *bench) syncs(d time.Duration) ([]float64, error) {
	f, err := os.Create(filepath.Join(b.dir, "syncs"))
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var all []float64
	for end := time.Now().Add(d); time.Now().Before(end); {
		began := time.Now()
		if _, err := f.Write(make([]byte, 250)); err != nil {
			return nil, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return nil, err
		}
		all = append(all, float64(time.Since(began))/1e6)
	}
	return all, nil
}

// perf is what perfdhcp says.
type perf struct {
	rate   float64   // exchanges a second
	delays []float64 // to ACKs, in milliseconds; a second where there came none
}

var (
	perfRate  = regexp.MustCompile(`Rate: ([0-9.]+)`)
	perfDrops = regexp.MustCompile(`drops: ([0-9]+)`)
	perfTimes = regexp.MustCompile(`sent / received: ([0-9.]+) / ([0-9.]+)`)
)

// perfdhcp runs kea's load generator as many clients behind a relay.
func perfdhcp(ctx context.Context, args ...string) (perf, error) {
	var r perf
	for i, arg := range args {
		if arg == "-r" && args[i+1] == "0" {
			args = args[:i]
			break
		}
	}
	args = append([]string{"perfdhcp", "-4", "-R", "4000000", "-l", clientAddr}, append(args, hubAddr)...)
	out, err := client(ctx, args...).CombinedOutput()
	found := perfRate.FindSubmatch(out)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 3 { // some were lost
		err = nil
	}
	if err != nil || found == nil {
		return r, fmt.Errorf("%s: %w\n%.2000s", strings.Join(args, " "), err, out)
	}
	r.rate, err = strconv.ParseFloat(string(found[1]), 64)
	_, acks, _ := strings.Cut(string(out), "***Statistics for: REQUEST-ACK***")
	_, times, _ := strings.Cut(acks, "***Timestamps for packets: REQUEST-ACK***")
	for _, m := range perfTimes.FindAllStringSubmatch(times, -1) {
		var sent, received float64
		fmt.Sscan(m[1], &sent)
		fmt.Sscan(m[2], &received)
		r.delays = append(r.delays, 1000*(received-sent))
	}
	if m := perfDrops.FindStringSubmatch(acks); m != nil && times != "" {
		lost, _ := strconv.Atoi(m[1])
		for range lost {
			r.delays = append(r.delays, 1000)
		}
	}
	return r, err
}
