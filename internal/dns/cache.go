package dns

import (
	"hash/maphash"
	"sync/atomic"
	"time"
)

// The cache has room for so many answers, none larger than that.
const (
	sets, ways   = 2048, 4
	mostCachedAt = 4096
)

// cache keeps answers by their keys. Each has a few places where it can be, so that to
// look for it takes no lock, and to keep it throws another one out, if need be: one that
// is of no use any more, or soon.
type cache struct {
	seed maphash.Seed
	sets [sets][ways]atomic.Pointer[answer]
}

func newCache() *cache { return &cache{seed: maphash.MakeSeed()} }

func (c *cache) set(key []byte) *[ways]atomic.Pointer[answer] {
	return &c.sets[maphash.Bytes(c.seed, key)%sets]
}

// get is the answer to a question; nil: there is none.
func (c *cache) get(q *question, now time.Time) *answer {
	set := c.set(q.key)
	for i := range set {
		if a := set[i].Load(); a != nil && a.key == string(q.key) && now.Before(a.until) {
			return a
		}
	}
	return nil
}

func (c *cache) put(a *answer) {
	if len(a.body) > mostCachedAt {
		return
	}
	set := c.set([]byte(a.key))
	place := 0
	for i := range set {
		old := set[i].Load()
		if old == nil || old.key == a.key {
			place = i
			break
		}
		if old.until.Before(set[place].Load().until) {
			place = i
		}
	}
	set[place].Store(a)
}
