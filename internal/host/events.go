package host

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

// EventKind says what has happened to a microVM.
type EventKind string

// The kinds of event.
const (
	Created EventKind = "created"
	Changed EventKind = "changed"
	Deleted EventKind = "deleted"
)

// Event is a change of a microVM.
type Event struct {
	Cursor string // with which Events goes on after it, also in the next daemon
	Kind   EventKind
	// Was are the labels before, nil if the change was none of labels.
	Was map[string]string
	// View is the microVM as the change has made it. Of one that is gone the spec has
	// no more than its names and labels.
	View View
}

// entry is an event in the journal. Not what only the guest may know is in it: the
// spec's metadata.
type entry struct {
	Seq       uint64            `json:"seq"`
	Kind      EventKind         `json:"kind"`
	UID       string            `json:"uid"`
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
	Was       map[string]string `json:"was,omitzero"` // none is not the same as no others
	Status    vm.Status         `json:"status"`
}

// journal keeps what has happened, in a file, so that who watches misses nothing when
// the daemon is killed: an event is told only once it is written. A power failure may
// take the last ones with it, and they are told all the same where the disk is full:
// who has had what is not in the file, or comes too late for its bounds, has to look
// at all microVMs again.
type journal struct {
	dir string
	log *slog.Logger

	mu      sync.Mutex        // guards what follows; nothing is written under it
	id      string            // another one for each daemon, and after each failure to write
	before  []span            // those before it
	seq     uint64            // the newest event's
	written uint64            // the newest one's that is in the file
	counts  map[EventKind]int // of those that are written, by this daemon
	pending []entry
	recent  []entry       // the last that were written
	marks   [2][]mark     // of the file before and of the file, by their events' numbers
	more    chan struct{} // closed when there are more of them
	wake    chan struct{}

	// The writer's.
	file   *os.File
	size   int64
	headed bool // the file says which id what follows has
}

// span is an id that cursors had, and the newest event that they may name.
type span struct {
	id  string
	end uint64
}

// mark is where in its file an event is. Each batchEvents-th one has a mark.
type mark struct {
	seq uint64
	at  int64
}

const (
	journalName = "events.log"
	// journalSize is what a journal's file may have; the one before it is kept.
	journalSize = 8 << 20
	// recentEvents are those that are told without reading the file.
	recentEvents = 512
	// batchEvents are what a watch has in memory at most, and reads anew at a time, however
	// much it has missed: there are thousands of them, and not all are read by their clients.
	batchEvents = 32
)

// journalHead is a line before events: the id that cursors had when they were written. A
// file begins with one.
type journalHead struct {
	Journal string `json:"journal"`
}

func newJournal(dir string, log *slog.Logger) *journal {
	return &journal{dir: dir, log: log, id: journalID(), counts: map[EventKind]int{}, more: make(chan struct{}), wake: make(chan struct{}, 1)}
}

func journalID() string { return strings.ToLower(rand.Text()[:12]) }

func (j *journal) paths() [2]string {
	path := filepath.Join(j.dir, journalName)
	return [2]string{path + ".1", path}
}

// open reads what is there, and returns the last event of each microVM that is not
// gone. It writes nothing: a daemon starts on a full disk, too.
func (j *journal) open() (map[string]entry, error) {
	last := map[string]entry{}
	for i, path := range j.paths() {
		good, err := readJournal(path, 0, func(id string, at int64, e entry) bool {
			j.seq = e.Seq
			j.marks[i] = marked(j.marks[i], e.Seq, at)
			if n := len(j.before); n == 0 || j.before[n-1].id != id {
				j.before = append(j.before, span{id: id})
			}
			j.before[len(j.before)-1].end = e.Seq
			last[e.UID] = e
			if e.Kind == Deleted {
				delete(last, e.UID)
			}
			return true
		})
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if path == j.paths()[1] {
			if err := os.Truncate(path, good); err != nil { // the last line may be torn
				return nil, err
			}
		}
	}
	j.written = j.seq
	return last, nil
}

// marked adds a mark of an event, where it is time for one.
func marked(marks []mark, seq uint64, at int64) []mark {
	if n := len(marks); n > 0 && seq < marks[n-1].seq+batchEvents {
		return marks
	}
	return append(marks, mark{seq, at})
}

// readJournal reads a journal's file from a line on, as far as its lines are whole and
// each wants more, and says how far that is. Each event has its line's place and, where
// the file is read from its beginning, the id that cursors had.
func readJournal(path string, from int64, each func(id string, at int64, e entry) (more bool)) (good int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if good, err = f.Seek(from, io.SeekStart); err != nil {
		return 0, err
	}
	id := ""
	for lines := bufio.NewReader(f); ; {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return good, nil
		}
		if err != nil {
			return good, err
		}
		var read struct {
			journalHead
			entry
		}
		if json.Unmarshal(line, &read) != nil || from == 0 && id == "" && read.Journal == "" {
			return good, nil // nothing from here on is known
		}
		if read.Journal != "" {
			id = read.Journal
		} else if !each(id, good, read.entry) {
			return good, nil
		}
		good += int64(len(line))
	}
}

// add notes what has happened to a microVM.
func (j *journal) add(kind EventKind, v View) { j.relabel(kind, v, nil) }

// relabel notes a change of its labels, which were others before.
func (j *journal) relabel(kind EventKind, v View, was map[string]string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seq++
	j.pending = append(j.pending, entry{
		Seq: j.seq, Kind: kind, UID: v.Spec.UID, Namespace: v.Spec.Namespace, Name: v.Spec.Name, Labels: v.Spec.Labels, Was: was, Status: v.Status,
	})
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// run writes what is noted until ctx ends and all is written.
func (j *journal) run(ctx context.Context) {
	defer func() {
		if j.file != nil {
			j.file.Close()
		}
	}()
	for ended := false; ; {
		j.mu.Lock()
		batch := j.pending
		j.pending = nil
		j.mu.Unlock()
		switch {
		case len(batch) > 0:
			err := j.write(batch)
			if err != nil {
				j.log.Error("events are not in the journal: who does not watch now has to begin anew", "err", err)
				j.part()
			}
			j.tell(batch, err == nil)
		case ended:
			return
		default:
			select {
			case <-j.wake:
			case <-ctx.Done():
				ended = true
			}
		}
	}
}

// write puts events into the file, all or none of them.
func (j *journal) write(batch []entry) error {
	if err := j.turn(); err != nil {
		return err
	}
	var text bytes.Buffer
	lines := json.NewEncoder(&text)
	if !j.headed {
		if err := lines.Encode(journalHead{j.id}); err != nil { // only this goroutine changes it
			return err
		}
	}
	marks := j.marks[1] // only this goroutine changes them
	for _, e := range batch {
		marks = marked(marks, e.Seq, j.size+int64(text.Len()))
		if err := lines.Encode(e); err != nil {
			return err
		}
	}
	if _, err := j.file.Write(text.Bytes()); err != nil {
		return errors.Join(err, j.file.Truncate(j.size))
	}
	j.size += int64(text.Len())
	j.headed = true
	j.mu.Lock()
	defer j.mu.Unlock()
	j.marks[1] = marks
	return nil
}

// turn opens the file, and begins another one when it is full.
func (j *journal) turn() error {
	paths := j.paths()
	if j.file != nil && j.size > journalSize {
		err := os.Rename(paths[1], paths[0])
		if err == nil {
			j.mu.Lock()
			j.marks = [2][]mark{j.marks[1], nil}
			j.mu.Unlock()
		}
		err = errors.Join(err, j.file.Close())
		j.file = nil
		if err != nil {
			return err
		}
	}
	if j.file != nil {
		return nil
	}
	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(paths[1], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	j.file, j.size, j.headed = f, info.Size(), false
	return nil
}

// part takes another id: the file, from which the next daemon tells what cursors mean,
// is not to take one of an event that it has not for one of a later event.
func (j *journal) part() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.before = append(j.before, span{j.id, j.seq}) // they are in memory, for a while
	j.id, j.headed = journalID(), false
}

// tell shows what is written.
func (j *journal) tell(batch []entry, written bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range batch {
		if written {
			j.counts[e.Kind]++
		}
	}
	j.written = batch[len(batch)-1].Seq
	j.recent = append(j.recent, batch...)
	if extra := len(j.recent) - recentEvents; extra > recentEvents {
		j.recent = append([]entry(nil), j.recent[extra:]...)
	}
	close(j.more)
	j.more = make(chan struct{})
}

// now is the cursor of the newest event.
func (j *journal) now() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.cursorLocked(j.seq)
}

// cursor is that of an event.
func (j *journal) cursor(seq uint64) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.cursorLocked(seq)
}

func (j *journal) cursorLocked(seq uint64) string {
	for _, s := range j.before {
		if seq <= s.end {
			return cursor(s.id, seq)
		}
	}
	return cursor(j.id, seq)
}

func cursor(id string, seq uint64) string { return id + "-" + strconv.FormatUint(seq, 10) }

// at reads a cursor.
func (j *journal) at(text string) (uint64, error) {
	id, number, _ := strings.Cut(text, "-")
	seq, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return 0, &vm.FieldError{Field: "resume", Problem: fmt.Sprintf("%q is no cursor of a watch", text)}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range append(j.before, span{j.id, j.seq}) {
		if s.id == id && seq <= s.end {
			return seq, nil
		}
	}
	return 0, errMissed
}

var errMissed = fmt.Errorf("the events after this cursor are not kept any more: watch anew, without one: %w", errdefs.ErrOutOfRange)

// after waits for events after seq, and returns the first of them.
func (j *journal) after(ctx context.Context, seq uint64) ([]entry, error) {
	for {
		j.mu.Lock()
		more, recent, written := j.more, j.recent, j.written
		j.mu.Unlock()
		switch {
		case len(recent) > 0 && recent[0].Seq <= seq+1:
			if n := int(seq + 1 - recent[0].Seq); n < len(recent) {
				return slices.Clone(recent[n:min(n+batchEvents, len(recent))]), nil
			}
		case seq < written:
			return j.old(seq)
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// old reads the first events after seq from the files.
func (j *journal) old(seq uint64) ([]entry, error) {
	for range 3 { // one file may take the other's place meanwhile, and then what is read is another
		path, at, ok := j.find(seq + 1)
		if !ok {
			return nil, errMissed
		}
		var found []entry
		_, err := readJournal(path, at, func(_ string, _ int64, e entry) bool {
			next := seq + 1 + uint64(len(found))
			if e.Seq == next {
				found = append(found, e)
			}
			return e.Seq <= next && len(found) < batchEvents
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("read the journal of events: %w", err)
		}
		if len(found) > 0 {
			return found, nil
		}
	}
	return nil, errMissed
}

// find says where to look for an event.
func (j *journal) find(seq uint64) (path string, at int64, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for i, marks := range slices.Backward(j.marks[:]) {
		n, exact := slices.BinarySearchFunc(marks, seq, func(m mark, seq uint64) int { return cmp.Compare(m.seq, seq) })
		if exact {
			n++
		}
		if n > 0 {
			return j.paths()[i], marks[n-1].at, true
		}
	}
	return "", 0, false
}

// Now is a cursor: Events goes on from it with what happens next.
func (h *Host) Now() string { return h.events.now() }

// Events sends what has happened after a cursor, and what happens, until ctx ends or
// send fails. Each change is sent, however slow send is. errdefs.ErrOutOfRange means that
// they are not kept any more from there on.
func (h *Host) Events(ctx context.Context, since string, send func(Event) error) error {
	seq, err := h.events.at(since)
	if err != nil {
		return err
	}
	for {
		batch, err := h.events.after(ctx, seq)
		if err != nil {
			return err
		}
		for _, e := range batch {
			if err := send(h.event(e)); err != nil {
				return err
			}
			seq = e.Seq
		}
	}
}

// event completes what the journal has.
func (h *Host) event(e entry) Event {
	s := vm.Spec{UID: e.UID, Namespace: e.Namespace, Name: e.Name, Labels: e.Labels}
	v := View{Spec: s, Status: e.Status, Dir: place(h.root(), s)}
	if i, err := h.find(e.UID); err == nil {
		v.Spec = i.view().Spec
		v.Spec.Labels = e.Labels
	}
	return Event{Cursor: h.events.cursor(e.Seq), Kind: e.Kind, Was: e.Was, View: v}
}

// catchUp notes what has happened without a word in the journal: the daemon before was
// killed, or had none.
func (h *Host) catchUp(last map[string]entry) {
	for _, v := range h.all() {
		w := v.view()
		e, known := last[w.Spec.UID]
		delete(last, w.Spec.UID)
		switch {
		case !known:
			h.events.add(Created, w)
		case !reflect.DeepEqual(notable(e.Status), notable(w.Status)) || !maps.Equal(e.Labels, w.Spec.Labels):
			h.events.add(Changed, w)
		}
	}
	for _, e := range last {
		h.events.add(Deleted, View{Spec: vm.Spec{UID: e.UID, Namespace: e.Namespace, Name: e.Name, Labels: e.Labels}, Status: e.Status})
	}
}

// notable is what of a status is an event when it changes: all but how far a step is.
func notable(s vm.Status) vm.Status {
	s.Version = 0
	s.Step, _, _ = strings.Cut(s.Step, " ")
	return s
}
