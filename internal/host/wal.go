package host

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// wal is a write-ahead log of new records (docs/decisions/014-write-ahead.md). What is in
// it is on disk before the files of the microVM are, whose new directories would cost a
// commit of the file system's journal, with all that others have changed. Each microVM's
// file is its record all the same: the log only gives back what a power failure took.
//
// The file has two halves that take turns. While one is filled, what the other has is
// brought to disk in its place, and the half is cleared. All bytes of the file are
// there from the start, so that a write changes no metadata.
type wal struct {
	root string // of the microVMs' directories
	log  *slog.Logger
	file *os.File
	lost []Broken // what could not be given back

	working sync.WaitGroup // who writes and who clears

	mu      sync.Mutex // guards what follows
	halves  [2]walHalf
	current int
	seq     uint64
	queue   []*walPut
	writing bool
	failed  error          // nothing is written any more
	puts    map[string]int // the half that has a microVM's record, by its directory
}

type walHalf struct {
	used    int
	dirs    []string       // what it is about
	placing sync.WaitGroup // records whose files are not there yet
	clear   chan struct{}  // closed once the other half may give way to it
}

// walPut is one who waits until something is on disk.
type walPut struct {
	dir  string
	data []byte // nil: it is gone
	done chan error
}

const (
	walName = "records.wal"
	walSize = 512 << 10 // of a half
	walHead = 20        // of an entry: magic, number, length, checksum
)

var walMagic = [4]byte{'I', 'W', 'A', '1'}

// errTooLarge is of a record that the log has no place for.
var errTooLarge = errors.New("too large for the write-ahead log")

// openWAL gives back what a power failure took, and begins an empty log. There is none, and
// it is nil, on a file system that it would not help, or where there is no room. What
// could not be given back is in lost.
func openWAL(ctx context.Context, stateDir, root string, log *slog.Logger) (*wal, error) {
	path := filepath.Join(stateDir, walName)
	if ok, err := overwrites(stateDir); !ok || err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			log.Warn("there is no write-ahead log", "err", err)
			return nil, nil
		}
	}
	if err != nil {
		return nil, err
	}
	w := &wal{root: root, log: log, file: f, puts: map[string]int{}}
	for i := range w.halves {
		w.halves[i].clear = make(chan struct{})
		close(w.halves[i].clear)
	}
	if err := w.hold(ctx); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	halves, err := w.read()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	w.recover(halves)
	if len(w.lost) > 0 {
		err = errors.New("it has records that could not be put in their place")
	} else {
		err = w.empty(halves)
	}
	switch {
	case err != nil && len(halves[0])+len(halves[1]) == 0: // no room
		log.Warn("there is no write-ahead log", "err", errors.Join(err, f.Close()))
		return nil, nil
	case err != nil: // what may still come back from it must not be removed
		w.fail(fmt.Errorf("empty %s: %w", path, err))
		for i, h := range halves {
			for _, e := range h {
				w.puts[e.dir] = i
			}
		}
	}
	return w, nil
}

// holdTime is how long the daemon before may take to end.
const holdTime = 5 * time.Second

// hold has the log for this daemon alone: one that was started by mistake beside another
// would empty what that has acknowledged.
func (w *wal) hold(ctx context.Context) error {
	for deadline := time.Now().Add(holdTime); ; {
		err := unix.Flock(int(w.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("another daemon keeps the microVMs of %s: %w", filepath.Dir(w.file.Name()), errdefs.ErrFailedPrecondition)
		}
		select {
		case <-time.After(holdTime / 100):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fail has nothing more written. The caller holds w.mu, or is alone.
func (w *wal) fail(err error) {
	if w.failed == nil {
		w.failed = err
		w.log.Error("the write-ahead log is not used any more: what it has can't be deleted before a new daemon has read it", "err", err)
	}
}

// overwrites says whether bytes of a file are written where they were before, and take
// neither room nor a change of metadata.
func overwrites(dir string) (bool, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return false, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return s.Type == unix.EXT4_SUPER_MAGIC || s.Type == unix.XFS_SUPER_MAGIC, nil
}

func (w *wal) read() (halves [2][]walEntry, err error) {
	text, err := io.ReadAll(w.file)
	if err != nil {
		return halves, err
	}
	for i := range halves {
		if from := i * walSize; from < len(text) {
			halves[i] = walEntries(text[from:min(from+walSize, len(text))])
		}
	}
	return halves, nil
}

// recover puts those records in their place that are not there.
func (w *wal) recover(halves [2][]walEntry) {
	all := slices.Concat(halves[:]...)
	slices.SortFunc(all, func(a, b walEntry) int { return cmp.Compare(a.seq, b.seq) })
	last := map[string]walEntry{}
	for _, e := range all {
		last[e.dir] = e
	}
	for _, e := range last {
		if err := w.recoverOne(e); err != nil {
			w.lost = append(w.lost, Broken{filepath.Join(w.root, e.dir, recordName), fmt.Errorf("put it back from %s: %w", walName, err)})
		}
	}
}

func (w *wal) recoverOne(e walEntry) error {
	if !filepath.IsLocal(e.dir) || strings.Count(e.dir, "/") != 2 {
		return fmt.Errorf("%q is no place of a microVM: %w", e.dir, os.ErrInvalid)
	}
	dir := filepath.Join(w.root, e.dir)
	there, err := os.ReadFile(filepath.Join(dir, recordName))
	// What else is in it somebody has changed.
	torn := err == nil && len(there) <= len(e.data) && !bytes.Equal(there, e.data) && bytes.HasPrefix(e.data, bytes.TrimRight(there, "\x00"))
	if len(e.data) > 0 && (torn || errors.Is(err, os.ErrNotExist)) {
		w.log.Info("a microVM's record is back", "path", dir)
		if err := (record{Dir: dir}).lay(e.data); err != nil {
			return err
		}
	}
	return settle(dir) // the removal of one that is gone may have to go on, by its record
}

// empty begins the log anew. The later half may say that what the earlier one has is gone:
// it goes last.
func (w *wal) empty(halves [2][]walEntry) error {
	order := []int{0, 1}
	if a, b := halves[0], halves[1]; len(a) > 0 && len(b) > 0 && a[0].seq > b[0].seq {
		order = []int{1, 0}
	}
	// Nothing is read after the first bytes, which are gone before others are.
	for _, size := range []int{walHead, walSize} {
		for _, i := range order {
			if _, err := w.file.WriteAt(make([]byte, size), int64(i*walSize)); err != nil {
				return err
			}
			if err := w.file.Sync(); err != nil {
				return err
			}
		}
	}
	return syncFile(filepath.Dir(w.file.Name()))
}

// close brings what the log has to disk in its place, and leaves it empty: the next daemon
// may be an older one, which does not read it.
func (w *wal) close() error {
	if w == nil {
		return nil
	}
	w.working.Wait()
	if w.failed == nil {
		w.halves[w.current].clear = make(chan struct{})
		w.clear(w.current)
	}
	return errors.Join(w.failed, w.file.Close())
}

// create puts a new record on disk, by the log, and in its place.
func (w *wal) create(r record) error {
	if w == nil {
		return r.create()
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	dir := strings.TrimPrefix(r.Dir, w.root+"/")
	var placed func()
	var unwritten error
	var writing sync.WaitGroup
	writing.Go(func() { placed, unwritten = w.put(dir, b) })
	err = r.lay(b)
	writing.Wait()
	if unwritten == nil {
		defer placed()
	}
	switch {
	case err != nil && unwritten == nil:
		return errors.Join(err, w.gone(dir))
	case err == nil && unwritten != nil:
		return r.create()
	}
	return err
}

// remove takes a microVM's directory away, so that it does not come back.
func (w *wal) remove(r record) error {
	if w != nil {
		if err := w.gone(strings.TrimPrefix(r.Dir, w.root+"/")); err != nil {
			return err
		}
	}
	return r.remove()
}

// settle brings what is in a record's place to disk: its file, or that it is gone.
func settle(dir string) error {
	err := syncFile(filepath.Join(dir, recordName))
	for errors.Is(err, os.ErrNotExist) && dir != filepath.Dir(dir) {
		err = syncFile(dir)
		dir = filepath.Dir(dir)
	}
	return err
}

type walEntry struct {
	seq  uint64
	dir  string
	data []byte // none: the record is gone
}

// walEntries reads a half, as far as it was written.
func walEntries(half []byte) (all []walEntry) {
	for len(half) >= walHead && bytes.Equal(half[:4], walMagic[:]) {
		seq, size, sum := binary.LittleEndian.Uint64(half[4:]), binary.LittleEndian.Uint32(half[12:]), binary.LittleEndian.Uint32(half[16:])
		if uint64(size) > uint64(len(half)-walHead) {
			break
		}
		body := half[walHead : walHead+size]
		if walSum(seq, body) != sum || len(all) > 0 && seq != all[len(all)-1].seq+1 { // torn, or of an earlier turn
			break
		}
		dir, data, ok := bytes.Cut(body, []byte{0})
		if !ok {
			break
		}
		all = append(all, walEntry{seq, string(dir), data})
		half = half[walHead+size:]
	}
	return all
}

func walSum(seq uint64, body []byte) uint32 {
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Checksum(binary.LittleEndian.AppendUint64(nil, seq), castagnoli), castagnoli, body)
}

func appendWALEntry(b []byte, seq uint64, dir string, data []byte) []byte {
	body := slices.Concat([]byte(dir), []byte{0}, data)
	b = append(b, walMagic[:]...)
	b = binary.LittleEndian.AppendUint64(b, seq)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = binary.LittleEndian.AppendUint32(b, walSum(seq, body))
	return append(b, body...)
}

// put brings a record to disk. The caller calls placed once its file is there, or is not
// to be; until then the log keeps it.
func (w *wal) put(dir string, data []byte) (placed func(), err error) {
	if walHead+len(dir)+1+len(data) > walSize {
		return nil, errTooLarge
	}
	p := &walPut{dir: dir, data: data, done: make(chan error, 1)}
	if err := w.write(p); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.halves[w.puts[dir]].placing.Done, nil
}

// gone brings to disk that a record is to be removed, if the log may give it back.
func (w *wal) gone(dir string) error {
	w.mu.Lock()
	_, there := w.puts[dir]
	w.mu.Unlock()
	if !there {
		return nil
	}
	return w.write(&walPut{dir: dir, done: make(chan error, 1)})
}

// write has an entry written, with those of all who ask meanwhile.
func (w *wal) write(p *walPut) error {
	w.mu.Lock()
	w.queue = append(w.queue, p)
	lead := !w.writing
	w.writing = true
	w.mu.Unlock()
	if lead { // not here: whoever leads waits for those who place their records
		w.working.Go(w.lead)
	}
	return <-p.done
}

// lead writes until nobody waits.
func (w *wal) lead() {
	for {
		w.mu.Lock()
		batch := w.queue
		w.queue = nil
		w.writing = len(batch) > 0
		w.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		for len(batch) > 0 {
			n, err := w.flush(batch)
			for _, p := range batch[:n] {
				p.done <- err
			}
			batch = batch[n:]
		}
	}
}

// flush writes as many entries as the half has room for, one at least, and says how many
// they were.
func (w *wal) flush(batch []*walPut) (n int, err error) {
	w.mu.Lock()
	failed := w.failed
	h := &w.halves[w.current]
	var text []byte
	for n < len(batch) {
		p := batch[n]
		if h.used+len(text)+walHead+len(p.dir)+1+len(p.data) > walSize {
			break
		}
		text = appendWALEntry(text, w.seq, p.dir, p.data)
		w.seq++
		n++
	}
	w.mu.Unlock()
	if failed != nil {
		return len(batch), failed
	}
	if n == 0 {
		w.turn()
		return 0, nil
	}
	written, err := w.file.WriteAt(text, int64(w.current*walSize+h.used))
	if err == nil {
		err = unix.Fdatasync(int(w.file.Fd()))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.fail(fmt.Errorf("write %s: %w", w.file.Name(), err))
		for _, p := range batch[:n] { // it may be there all the same
			if p.data != nil && written > 0 {
				w.puts[p.dir] = w.current
			}
		}
		return n, w.failed
	}
	h.used += len(text)
	for _, p := range batch[:n] {
		h.dirs = append(h.dirs, p.dir)
		if p.data != nil {
			w.puts[p.dir] = w.current
			h.placing.Add(1)
		}
	}
	return n, nil
}

// turn goes on with the other half, once that is clear, and has this one cleared.
func (w *wal) turn() {
	full := w.current
	<-w.halves[1-full].clear
	w.mu.Lock()
	defer w.mu.Unlock()
	w.current = 1 - full
	w.halves[full].clear = make(chan struct{})
	w.working.Go(func() { w.clear(full) })
}

// clear brings what a half has to disk in its place, and forgets it.
func (w *wal) clear(i int) {
	h := &w.halves[i]
	h.placing.Wait()
	var problems []error
	for _, dir := range h.dirs {
		problems = append(problems, settle(filepath.Join(w.root, dir)))
	}
	err := errors.Join(problems...)
	if err == nil { // its first entry is enough: nothing after it is read
		_, err = w.file.WriteAt(make([]byte, walHead), int64(i*walSize))
		err = errors.Join(err, unix.Fdatasync(int(w.file.Fd())))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	defer close(h.clear)
	if err != nil {
		w.fail(fmt.Errorf("clear %s: %w", w.file.Name(), err))
		return
	}
	for _, dir := range h.dirs {
		if w.puts[dir] == i {
			delete(w.puts, dir)
		}
	}
	h.used, h.dirs = 0, nil
}
