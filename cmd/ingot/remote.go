package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
)

// remote is a command in a guest, joined to this process's standard streams and
// signals. It outlives its connection: the same command is taken up again by another
// one when the host's daemon is back (ExecStart.id).
type remote struct {
	vm    microVM
	start *ingotv1.ExecStart

	controls chan *ingotv1.ExecRequest
	typed    chan []byte
	heard    atomic.Int64 // messages of the guest's
	lasting  bool         // the guest has it, and would give it to another connection

	stdout, stderr atomic.Uint64 // bytes of each that were written here
	confirmed      uint64        // of both, as far as the guest was told; only the receiver's

	// What was typed, as far as the guest may not have it, is the sender's.
	input      []byte
	from       uint64 // where in all that was typed input begins
	inputEnded bool
}

func newRemote(vm microVM, start *ingotv1.ExecStart) *remote {
	start.Id = rand.Text()
	return &remote{vm: vm, start: start, controls: make(chan *ingotv1.ExecRequest, 16), typed: make(chan []byte, 16)}
}

// attach runs a command in a guest. Its exit code comes back as an exitCode.
func attach(ctx context.Context, vm microVM, start *ingotv1.ExecStart) error {
	// A signal is for the command in the guest: the end of the stream ends us, or
	// that the guest takes no notice of it.
	ctx, giveUp := context.WithCancelCause(context.WithoutCancel(ctx))
	cancel := func() { giveUp(nil) }
	defer cancel()
	if start.GetTty() {
		start.Size = windowSize()
		if start.GetEnv()["TERM"] == "" && os.Getenv("TERM") != "" {
			start.Env["TERM"] = os.Getenv("TERM")
		}
		t, err := rawTerminal()
		if err != nil {
			return fmt.Errorf("set up the terminal: %w", err)
		}
		defer t.restore()
	}
	r := newRemote(vm, start)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGWINCH)
	defer signal.Stop(signals)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { r.signals(ctx, signals, func() { giveUp(errIgnored) }) })
	if start.GetStdin() {
		// Nothing interrupts a read of a terminal: it ends with the process.
		go r.stdin(ctx, os.Stdin, func() { giveUp(errIgnored) })
	}
	code, err := r.run(ctx, os.Stdout, os.Stderr)
	if errors.Is(context.Cause(ctx), errIgnored) {
		err = errIgnored
	}
	if err != nil {
		return fmt.Errorf("run %s in %s: %w", commandName(start), vm, err)
	}
	if code != 0 {
		return exitCode(code)
	}
	return nil
}

// commandName is what a command is called in errors.
func commandName(start *ingotv1.ExecStart) string {
	if start.GetMain() {
		return "the image's process"
	}
	return start.GetArgs()[0]
}

// run goes from connection to connection until the command ends.
func (r *remote) run(ctx context.Context, stdout, stderr io.Writer) (int, error) {
	var since time.Time // the last that was heard
	heard := int64(-1)
	for resume := false; ; resume = true {
		code, err := r.converse(ctx, resume, stdout, stderr)
		if err == nil || ctx.Err() != nil || !r.lasting || !lost(err) {
			return code, err
		}
		if now := r.heard.Load(); now != heard {
			heard, since = now, time.Now()
		}
		if time.Since(since) > away {
			return 0, err
		}
		if err := r.comeBack(ctx); err != nil {
			return 0, err
		}
	}
}

// lost says whether an error is the daemon's end, or that of its conversation with the
// guest.
func lost(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.FailedPrecondition:
		return true
	}
	return errors.Is(err, io.EOF)
}

const (
	// away is how long a lasting command waits in its guest for a daemon.
	away = 5 * time.Minute
	// silence is how long a daemon may be away before it is said.
	silence = time.Second
	// farewellWait is how long a daemon may take to hear that nobody will come back.
	farewellWait = time.Second
	// pause is between two tries to take a command up.
	pause = 100 * time.Millisecond
)

// comeBack waits until the microVM's daemon answers, and has the guest's agent.
func (r *remote) comeBack(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, away, fmt.Errorf("the daemon on %s did not come back within %s", r.vm.host.Name, away))
	defer cancel()
	notice := time.AfterFunc(silence, func() {
		fmt.Fprintf(os.Stderr, "\r\ningot: the daemon on %s has gone: waiting for it; the command goes on\r\n", r.vm.host.Name)
	})
	defer notice.Stop()
	select {
	case <-time.After(pause):
	case <-ctx.Done():
	}
	_, err := observe(ctx, r.vm, func() {}, func(vm microVM) (bool, error) {
		st := vm.GetStatus()
		switch state(st) {
		case "running":
			return st.GetAgentReady(), nil
		case "stopped", "failed", "deleting":
			return false, fmt.Errorf("the microVM is %s: %s", state(st), cmp.Or(st.GetReason(), "it has ended"))
		}
		return false, nil
	})
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// converse runs the command over one connection, until its end or the connection's.
func (r *remote) converse(ctx context.Context, resume bool, stdout, stderr io.Writer) (int, error) {
	// Who gives up says so to the guest, if that can be had in time.
	conn, hangUp := context.WithCancel(context.WithoutCancel(ctx))
	defer hangUp()
	stream, err := r.vm.host.Exec(conn)
	if err != nil {
		return 0, err
	}
	start := r.start
	if resume {
		start.Resume = &ingotv1.ExecReceived{Stdout: r.stdout.Load(), Stderr: r.stderr.Load()}
		start.Size = windowSize()
		r.confirmed = r.stdout.Load() + r.stderr.Load()
	}
	if err := send(stream, &ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: start}}); err != nil {
		return 0, err
	}
	s := newSender(r, stream, !resume)
	ctx, cancel := context.WithCancel(ctx)
	var sending sync.WaitGroup
	var wrong error
	sending.Go(func() {
		if wrong = s.run(ctx); wrong != nil {
			hangUp()
		}
	})
	context.AfterFunc(ctx, func() { time.AfterFunc(farewellWait, hangUp) })
	code, err := r.receive(s, stdout, stderr)
	cancel()
	sending.Wait()
	if wrong != nil {
		return 0, wrong
	}
	if err == nil {
		for err == nil { // the daemon hears that we have the code
			_, err = stream.Recv()
		}
		return code, nil
	}
	return 0, err
}

// send sends on a stream. Of a stream that has ended, Recv has the reason.
func send(stream ingotv1.Host_ExecClient, r *ingotv1.ExecRequest) error {
	if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// control has a signal or a window's size sent, before what is typed.
func (r *remote) control(c *ingotv1.ExecRequest) {
	select {
	case r.controls <- c:
	default: // nothing passes; the next one may
	}
}

// confirmAt is how much output is confirmed at a time: a part of what the guest keeps.
const confirmAt = 16 << 10

// receive writes what the command says until it ends, and returns its exit code.
func (r *remote) receive(s *sender, stdout, stderr io.Writer) (int, error) {
	for {
		m, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, fmt.Errorf("the connection ended before the command did: %w", err)
		}
		if err != nil {
			return 0, err
		}
		switch p := m.GetPayload().(type) {
		case *ingotv1.ExecResponse_Joined:
			r.lasting = p.Joined.GetLasting()
			s.join(p.Joined.GetStdin())
			continue
		case *ingotv1.ExecResponse_StdinTaken:
			s.took(int64(p.StdinTaken))
			continue
		case *ingotv1.ExecResponse_Stdout:
			err = written(stdout, p.Stdout, &r.stdout)
		case *ingotv1.ExecResponse_Stderr:
			err = written(stderr, p.Stderr, &r.stderr)
		case *ingotv1.ExecResponse_ExitCode:
			return int(p.ExitCode), nil
		}
		if err != nil {
			return 0, err
		}
		r.heard.Add(1)
		if all := r.stdout.Load() + r.stderr.Load(); all-r.confirmed >= confirmAt {
			r.confirmed = all
			wake(s.arrived)
		}
	}
}

func written(w io.Writer, b []byte, count *atomic.Uint64) error {
	n, err := w.Write(b)
	count.Add(uint64(n))
	return err
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// interrupt is Ctrl-C, which a raw terminal gives as it is.
const interrupt = 0x03

// stdin has sent what is typed, and the end of it. In a terminal a guest answers
// each Ctrl-C at least with ^C: one that does not is given up.
func (r *remote) stdin(ctx context.Context, from io.Reader, giveUp func()) {
	defer close(r.typed)
	buf := make([]byte, 32<<10)
	unanswered, heard := 0, int64(-1)
	for {
		n, err := from.Read(buf)
		if r.start.GetTty() && n == 1 && buf[0] == interrupt {
			if now := r.heard.Load(); now != heard {
				unanswered, heard = 0, now
			}
			if unanswered++; unanswered > mostSignals {
				giveUp()
				return
			}
		}
		if n > 0 {
			select {
			case r.typed <- bytes.Clone(buf[:n]):
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// What a guest that does not answer may ignore: so many signals, or one to
// terminate for so long.
const (
	mostSignals = 3
	lastWait    = 10 * time.Second
)

var errIgnored = errors.New("the guest takes no notice of signals; the command may still run there")

// signals passes signals and window sizes on until ctx ends.
func (r *remote) signals(ctx context.Context, from <-chan os.Signal, giveUp func()) {
	tty := r.start.GetTty()
	var patience <-chan time.Time
	for count := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-patience:
			giveUp()
			return
		case sig := <-from:
			if sig == syscall.SIGWINCH {
				if size := windowSize(); tty && size != nil {
					r.control(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Resize{Resize: size}})
				}
				continue
			}
			if count++; count == mostSignals && !tty {
				giveUp()
				return
			}
			if patience == nil && (sig == syscall.SIGTERM || sig == syscall.SIGHUP) {
				patience = time.After(lastWait)
			}
			r.control(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Signal{Signal: int32(sig.(syscall.Signal))}})
		}
	}
}
