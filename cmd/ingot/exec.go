package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
)

func execCommand() *cobra.Command {
	var stdin, tty bool
	var env []string
	var dir, user string
	cmd := &cobra.Command{
		Use:   "exec NAME -- COMMAND…",
		Short: "Run a command in a microVM",
		Long: "Run a command in a microVM by its agent, without a network. Its exit code becomes that of ingot. " + naming + `

With a terminal at both ends, -it is as if given.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			command, err := commandAfter(cmd, args)
			if err != nil {
				return err
			}
			if len(command) == 0 {
				return misused(cmd, "there is no command: ingot exec %s -- sh", args[0])
			}
			vars, err := variables(cmd, env)
			if err != nil {
				return err
			}
			if person := isTerminal(os.Stdin) && isTerminal(os.Stdout); person && !cmd.Flags().Changed("stdin") && !cmd.Flags().Changed("tty") {
				stdin, tty = true, true
			}
			if err := checkTerminal(cmd, stdin, tty); err != nil {
				return err
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return attach(cmd.Context(), vm, &ingotv1.ExecStart{
					Uid: vm.uid(), Args: command, Env: vars, WorkingDir: dir, User: user, Tty: tty, Stdin: stdin,
				})
			})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&stdin, "stdin", "i", false, "pass standard input")
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	f.StringArrayVarP(&env, "env-var", "e", nil, "set a variable: KEY=VALUE")
	f.StringVarP(&dir, "workdir", "w", "", "directory in the guest")
	f.StringVarP(&user, "user", "u", "", "user in the guest: name or id, and :group")
	f.SetInterspersed(false)
	return cmd
}

// checkTerminal refuses a terminal in the guest whose input is none here: the end
// of a file can't be told to it.
func checkTerminal(cmd *cobra.Command, stdin, tty bool) error {
	if stdin && tty && !isTerminal(os.Stdin) {
		return misused(cmd, "-t: standard input is no terminal; leave -t out")
	}
	return nil
}

// commandAfter parses the flags between a command's first argument and the
// command line that follows it, with or without -- before that, and returns the
// latter. The command's own flags must not be interspersed.
func commandAfter(cmd *cobra.Command, args []string) ([]string, error) {
	if err := cmd.Flags().Parse(args[1:]); err != nil {
		return nil, misused(cmd, "%w", err)
	}
	return cmd.Flags().Args(), nil
}

// variables are those of -e KEY=VALUE; -e KEY takes the value that it has here.
func variables(cmd *cobra.Command, given []string) (map[string]string, error) {
	vars := map[string]string{}
	for _, pair := range given {
		key, value, ok := strings.Cut(pair, "=")
		if key == "" {
			return nil, misused(cmd, "-e %s: it must be KEY=VALUE", pair)
		}
		if !ok {
			value = os.Getenv(key)
		}
		vars[key] = value
	}
	return vars, nil
}

// attach runs a command in a guest, joined to this process's standard streams
// and signals. Its exit code comes back as an exitCode.
func attach(ctx context.Context, vm microVM, start *ingotv1.ExecStart) error {
	// A signal is for the command in the guest: the end of the stream ends us, or
	// that the guest takes no notice of it.
	ctx, giveUp := context.WithCancelCause(context.WithoutCancel(ctx))
	cancel := func() { giveUp(nil) }
	defer cancel()
	stream, err := vm.host.Exec(ctx)
	if err != nil {
		return fmt.Errorf("run %s in %s: %w", commandName(start), vm, err)
	}
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
	s := newExecStream(stream)
	if err := s.send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: start}}); err != nil {
		return err
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGWINCH)
	defer signal.Stop(signals)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { s.signals(ctx, signals, start.GetTty(), func() { giveUp(errIgnored) }) })
	wg.Go(func() { s.sendAll(ctx) })
	if start.GetStdin() {
		// Nothing interrupts a read of a terminal: it ends with the process.
		go s.stdin(ctx, os.Stdin, start.GetTty(), func() { giveUp(errIgnored) })
	}
	code, err := s.receive(os.Stdout, os.Stderr)
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

// execStream is the stream of one command. gRPC's streams have one sender, which
// may be held up: signals are counted, and given up after, by somebody else.
type execStream struct {
	stream   ingotv1.Host_ExecClient
	heard    atomic.Int64 // messages of the guest's
	controls chan *ingotv1.ExecRequest
	typed    chan []byte
	taken    atomic.Int64  // bytes of stdin that the guest has
	more     chan struct{} // taken has grown
}

func newExecStream(stream ingotv1.Host_ExecClient) *execStream {
	return &execStream{
		stream: stream, controls: make(chan *ingotv1.ExecRequest, 16), typed: make(chan []byte, 16), more: make(chan struct{}, 1),
	}
}

func (s *execStream) send(r *ingotv1.ExecRequest) error {
	if err := s.stream.Send(r); err != nil && !errors.Is(err, io.EOF) { // of EOF, Recv has the reason
		return err
	}
	return nil
}

// control has a signal or a window's size sent, before what is typed.
func (s *execStream) control(r *ingotv1.ExecRequest) {
	select {
	case s.controls <- r:
	default: // nothing passes; the next one may
	}
}

// stdinWindow is how much of stdin may be on its way (ExecResponse.stdin_taken).
const stdinWindow = 256 << 10

// sendAll sends until ctx ends, no more of what is typed than the guest takes:
// else a signal would wait behind it.
func (s *execStream) sendAll(ctx context.Context) {
	sent, ended := int64(0), false
	for {
		typed := s.typed
		if ended || sent-s.taken.Load() >= stdinWindow {
			typed = nil
		}
		var r *ingotv1.ExecRequest
		select {
		case <-ctx.Done():
			return
		case <-s.more:
			continue
		case r = <-s.controls:
		case b, ok := <-typed:
			sent += int64(len(b))
			r = &ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Stdin{Stdin: b}}
			if ended = !ok; ended {
				r.Payload = &ingotv1.ExecRequest_StdinEof{StdinEof: true}
			}
		}
		if s.send(r) != nil {
			return
		}
	}
}

// interrupt is Ctrl-C, which a raw terminal gives as it is.
const interrupt = 0x03

// stdin has sent what is typed, and the end of it. In a terminal a guest answers
// each Ctrl-C at least with ^C: one that does not is given up.
func (s *execStream) stdin(ctx context.Context, r io.Reader, tty bool, giveUp func()) {
	defer close(s.typed)
	buf := make([]byte, 32<<10)
	unanswered, heard := 0, int64(-1)
	for {
		n, err := r.Read(buf)
		if tty && n == 1 && buf[0] == interrupt {
			if now := s.heard.Load(); now != heard {
				unanswered, heard = 0, now
			}
			if unanswered++; unanswered > mostSignals {
				giveUp()
				return
			}
		}
		if n > 0 {
			select {
			case s.typed <- bytes.Clone(buf[:n]):
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
func (s *execStream) signals(ctx context.Context, from <-chan os.Signal, tty bool, giveUp func()) {
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
					s.control(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Resize{Resize: size}})
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
			s.control(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Signal{Signal: int32(sig.(syscall.Signal))}})
		}
	}
}

// receive writes what the command says until it ends, and returns its exit code.
func (s *execStream) receive(stdout, stderr io.Writer) (int, error) {
	for {
		r, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, errors.New("the connection ended before the command did")
		}
		if err != nil {
			return 0, err
		}
		if _, ok := r.GetPayload().(*ingotv1.ExecResponse_StdinTaken); !ok {
			s.heard.Add(1)
		}
		switch p := r.GetPayload().(type) {
		case *ingotv1.ExecResponse_Stdout:
			_, err = stdout.Write(p.Stdout)
		case *ingotv1.ExecResponse_Stderr:
			_, err = stderr.Write(p.Stderr)
		case *ingotv1.ExecResponse_StdinTaken:
			s.taken.Add(int64(p.StdinTaken))
			select {
			case s.more <- struct{}{}:
			default:
			}
		case *ingotv1.ExecResponse_ExitCode:
			return int(p.ExitCode), nil
		}
		if err != nil {
			return 0, err
		}
	}
}
