package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// progress tells on standard error what is being done: one line that is
// rewritten where that is a terminal, else a line for each step, once.
type progress struct {
	w     io.Writer
	live  bool
	start time.Time

	mu    sync.Mutex      // guards what is below, and w
	told  map[string]bool // steps that have a line
	shown bool            // a live line stands there
}

func newProgress() *progress {
	return &progress{w: os.Stderr, live: isTerminal(os.Stderr), start: time.Now(), told: map[string]bool{}}
}

// say shows a step, and on a terminal the detail that changes within it.
func (p *progress) say(step, detail string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live {
		fmt.Fprintf(p.w, "\r\x1b[K%5.1fs  %s %s", time.Since(p.start).Seconds(), step, detail)
		p.shown = true
	} else if !p.told[step] {
		fmt.Fprintf(p.w, "%5.1fs  %s\n", time.Since(p.start).Seconds(), step)
	}
	p.told[step] = true
}

// line writes a line that stays.
func (p *progress) line(format string, a ...any) {
	p.clear()
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.w, "%5.1fs  %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, a...))
}

// clear takes the live line away, before something else is written.
func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}

// transferred is how far a transfer is: bytes and, where the total is known, percent.
func transferred(offset, total int64) string {
	mb := func(n int64) float64 { return float64(n) / 1e6 }
	if total <= 0 {
		if offset <= 0 {
			return ""
		}
		return fmt.Sprintf("%.1f MB", mb(offset))
	}
	return fmt.Sprintf("%.1f/%.1f MB %d %%", mb(offset), mb(total), min(100, offset*100/total))
}
