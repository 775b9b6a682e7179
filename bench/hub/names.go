package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// names compares answers from the cache, of a thousand names.
func (b *bench) names(ctx context.Context) error {
	upstream, err := b.start("upstream")
	if err != nil {
		return err
	}
	defer upstream.stop()
	var questions strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&questions, "h%d.bench.example A\n", i)
	}
	file := filepath.Join(b.dir, "questions")
	if err := os.WriteFile(file, []byte(questions.String()), 0o600); err != nil {
		return err
	}
	found := map[string][]float64{}
	for range rounds {
		for _, name := range []string{"ingot", "dnsmasq", "answers"} {
			err := b.with(ctx, name, resolves, func(*server) error {
				if _, err := dnsperf(ctx, file, "-n", "1", "-q", "10"); err != nil { // they are in the cache then
					return err
				}
				rate, err := dnsperf(ctx, file, "-l", "2", "-q", "200")
				found[name] = append(found[name], rate)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	ours, others, ceiling := median(found["ingot"]), median(found["dnsmasq"]), median(found["answers"])
	show("DNS answers/s, cached", "ingot %.0f, dnsmasq %.0f; the most that dnsperf can count here %.0f", ours, others, ceiling)
	show("of what dnsperf can count", "ingot %.2f, dnsmasq %.2f", ours/ceiling, others/ceiling)
	b.judge("DNS against dnsmasq", ours/others, 1, 2, "x")
	return nil
}

var (
	dnsRate = regexp.MustCompile(`Queries per second: +([0-9.]+)`)
	dnsGood = regexp.MustCompile(`NOERROR [0-9]+ \(100\.00%\)`)
)

// dnsperf is the answers a second that it counts.
func dnsperf(ctx context.Context, file string, args ...string) (float64, error) {
	args = append([]string{"dnsperf", "-s", hubAddr, "-d", file, "-c", "4", "-t", "1"}, args...)
	out, err := client(ctx, args...).CombinedOutput()
	found := dnsRate.FindSubmatch(out)
	if err == nil && (found == nil || !dnsGood.Match(out)) {
		err = errors.New("not each answer is a good one")
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return strconv.ParseFloat(string(found[1]), 64)
}
