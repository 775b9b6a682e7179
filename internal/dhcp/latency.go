package dhcp

import (
	"sync/atomic"
	"time"
)

// LatencyBounds are the upper ends of a Latency's buckets; the last one has none.
var LatencyBounds = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second,
}

// Latency is how long answers took, from when the server read a message until it had
// sent what it says.
type Latency struct {
	Answers [len(LatencyBounds) + 1]uint64 // in each bucket
	Took    time.Duration                  // all together
}

// latency is a Latency that is being counted.
type latency struct {
	answers [len(LatencyBounds) + 1]atomic.Uint64
	took    atomic.Int64
}

func (l *latency) note(d time.Duration) {
	i := 0
	for i < len(LatencyBounds) && d > LatencyBounds[i] {
		i++
	}
	l.answers[i].Add(1)
	l.took.Add(int64(d))
}

func (l *latency) read() Latency {
	var all Latency
	for i := range l.answers {
		all.Answers[i] = l.answers[i].Load()
	}
	all.Took = time.Duration(l.took.Load())
	return all
}
