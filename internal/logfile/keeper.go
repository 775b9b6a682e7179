package logfile

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// old is what is appended to the name of a log that was full.
const old = ".1"

// Max is how long a log gets before it is moved to FILE.1, so that twice as much
// is kept of it. A guest can write as fast as it likes.
const Max = 4 << 20

// Keeper bounds the logs of many directories. All of them share one inotify(7)
// instance: a directory costs no descriptor, no goroutine and no timer.
type Keeper struct {
	max    int64
	suffix []string
	log    *slog.Logger
	events *os.File

	mu   sync.Mutex // guards dirs
	dirs map[int32]directory
}

type directory struct {
	path   string
	suffix []string // of the logs in it that are bounded
}

// Open makes a keeper of the files that end in one of the suffixes: ".stdout".
func Open(suffixes []string, log *slog.Logger) (*Keeper, error) { return open(Max, suffixes, log) }

func open(max int64, suffixes []string, log *slog.Logger) (*Keeper, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch logs: %w", err)
	}
	return &Keeper{max: max, suffix: suffixes, log: log, events: os.NewFile(uintptr(fd), "inotify"), dirs: map[int32]directory{}}, nil
}

// Add bounds the logs in a directory, until that is removed: those with the keeper's
// suffixes, or with these alone. It may be repeated.
func (k *Keeper) Add(dir string, suffix ...string) error {
	if len(suffix) == 0 {
		suffix = k.suffix
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	conn, err := k.events.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch logs in %s: %w", dir, err)
	}
	var added error
	err = conn.Control(func(fd uintptr) {
		var wd int
		if wd, added = unix.InotifyAddWatch(int(fd), dir, unix.IN_MODIFY|unix.IN_ONLYDIR); added == nil {
			k.dirs[int32(wd)] = directory{dir, suffix}
		}
	})
	if err := errors.Join(err, added); err != nil {
		return fmt.Errorf("watch logs in %s: %w", dir, err)
	}
	// One that is full already, and that nobody writes to any more.
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return err
	}
	for _, path := range files {
		k.look(path, suffix)
	}
	return nil
}

// Run bounds the logs until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { k.events.Close() })
	defer stop()
	defer k.events.Close()
	for buffer := make([]byte, 64<<10); ; {
		n, err := k.events.Read(buffer)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch logs: %w", err)
		}
		k.hear(buffer[:n])
	}
}

// hear takes events apart (struct inotify_event) and looks at each file once.
func (k *Keeper) hear(events []byte) {
	seen := map[string]bool{}
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		length := binary.NativeEndian.Uint32(events[12:])
		name := string(bytes.TrimRight(events[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+length], "\x00"))
		events = events[unix.SizeofInotifyEvent+length:]
		k.mu.Lock()
		dir := k.dirs[wd]
		if mask&unix.IN_IGNORED != 0 { // the directory has gone
			delete(k.dirs, wd)
		}
		k.mu.Unlock()
		if path := filepath.Join(dir.path, name); dir.path != "" && name != "" && !seen[path] {
			seen[path] = true
			k.look(path, dir.suffix)
		}
	}
}

// look moves a log away that is full.
func (k *Keeper) look(path string, suffix []string) {
	if !slices.Contains(suffix, filepath.Ext(path)) {
		return
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() <= k.max {
		return
	}
	if err := k.rotate(path); err != nil {
		k.log.Warn("bound a log", "file", path, "err", err)
	}
}

// rotate copies the last part of a log to FILE.1 and empties it: its writer has it open
// to append, and goes on at the beginning. What is written in the moment between
// the last copy and the emptying is lost.
func (k *Keeper) rotate(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := f.Seek(max(0, end-k.max), io.SeekStart); err != nil {
		return err
	}
	kept, err := os.OpenFile(path+old, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	// Twice, since the first takes its time. A guest that writes for ever does not
	// keep this going for ever.
	for range 2 {
		if _, err = io.Copy(kept, io.LimitReader(f, 2*k.max)); err != nil {
			break
		}
	}
	return errors.Join(err, kept.Close(), f.Truncate(0))
}
