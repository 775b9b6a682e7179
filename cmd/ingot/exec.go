package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

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
	// A signal is for the command in the guest: only the end of the stream ends us.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stream, err := vm.host.Exec(ctx)
	if err != nil {
		return fmt.Errorf("run %s in %s: %w", start.GetArgs()[0], vm, err)
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
	s := &execStream{stream: stream}
	if err := s.send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: start}}); err != nil {
		return err
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGWINCH)
	defer signal.Stop(signals)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { s.signals(ctx, signals, start.GetTty()) })
	if start.GetStdin() {
		// Nothing interrupts a read of a terminal: it ends with the process.
		go s.stdin(os.Stdin)
	}
	code, err := s.receive(os.Stdout, os.Stderr)
	if err != nil {
		return fmt.Errorf("run %s in %s: %w", start.GetArgs()[0], vm, err)
	}
	if code != 0 {
		return exitCode(code)
	}
	return nil
}

// execStream is the stream of one command. gRPC's streams have one sender.
type execStream struct {
	stream ingotv1.Host_ExecClient
	mu     sync.Mutex // guards Send
}

func (s *execStream) send(r *ingotv1.ExecRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stream.Send(r); err != nil && !errors.Is(err, io.EOF) { // of EOF, Recv has the reason
		return err
	}
	return nil
}

// stdin sends what is typed, and the end of it.
func (s *execStream) stdin(r io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 && s.send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Stdin{Stdin: append([]byte(nil), buf[:n]...)}}) != nil {
			return
		}
		if err != nil {
			_ = s.send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_StdinEof{StdinEof: true}})
			return
		}
	}
}

// signals passes signals and window sizes on until ctx ends.
func (s *execStream) signals(ctx context.Context, from <-chan os.Signal, tty bool) {
	for {
		select {
		case <-ctx.Done():
			return
		case sig := <-from:
			if sig == syscall.SIGWINCH {
				if size := windowSize(); tty && size != nil {
					_ = s.send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Resize{Resize: size}})
				}
				continue
			}
			_ = s.send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Signal{Signal: int32(sig.(syscall.Signal))}})
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
		switch p := r.GetPayload().(type) {
		case *ingotv1.ExecResponse_Stdout:
			_, err = stdout.Write(p.Stdout)
		case *ingotv1.ExecResponse_Stderr:
			_, err = stderr.Write(p.Stderr)
		case *ingotv1.ExecResponse_ExitCode:
			return int(p.ExitCode), nil
		}
		if err != nil {
			return 0, err
		}
	}
}
