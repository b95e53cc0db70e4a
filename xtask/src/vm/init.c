/*
 * The first process of the guest: sets up what a distribution's would, profiles the workload, says on the console
 * what came of it, and powers off.
 *
 * Arguments: the seconds to sample, and how walks make their turns. Every line that the host reads starts with "@ "; report.rs says which there are.
 * What BPF objects cost is asked of the kernel by their ids: in this machine all of them are the agent's, and those
 * that it has closed count too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
    POLL_MS = 200,
    MAX_LINE = 64 * 1024, /* of a collapsed stack: a hundred frames with names of generic Rust functions */
};

/* What BPF objects there are. */
struct charge {
    unsigned long long map_bytes, program_bytes, verified_instructions;
    unsigned maps, programs;
};

static void mount_or_say(const char *type, const char *at)
{
    mkdir(at, 0755);
    /* devtmpfs may have been mounted by the kernel. */
    if (mount(type, at, type, 0, NULL) != 0 && errno != EBUSY)
        printf("@ failed mount %s: %s\n", type, strerror(errno));
}

static void raise_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0)
        printf("@ failed loopback: %s\n", strerror(errno));
    close(fd);
}

static void set_up(void)
{
    struct rlimit memory = {RLIM_INFINITY, RLIM_INFINITY};
    mount_or_say("proc", "/proc");
    mount_or_say("sysfs", "/sys");
    mount_or_say("devtmpfs", "/dev");
    mount_or_say("tmpfs", "/tmp");
    mount_or_say("tmpfs", "/data");
    raise_loopback();
    /* Before Linux 5.11 maps were charged against this limit. */
    setrlimit(RLIMIT_MEMLOCK, &memory);
    setenv("HOME", "/data", 1);
    setenv("PATH", "/", 1);
    setenv("RUST_LOG", "windlass_agent=info,windlass_agent::kernel=debug", 1);
}

/* The number behind KEY in the fdinfo of one of our descriptors; 0 if there is none (bpf_map_show_fdinfo,
   bpf_prog_show_fdinfo in kernel/bpf/syscall.c). */
static unsigned long long fdinfo(int fd, const char *key)
{
    char path[64], line[256];
    unsigned long long value = 0;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, key, strlen(key)) == 0)
            value = strtoull(line + strlen(key), NULL, 10);
    if (file)
        fclose(file);
    return value;
}

static int bpf(int command, union bpf_attr *attributes)
{
    return (int)syscall(SYS_bpf, command, attributes, sizeof *attributes);
}

static void add_all(struct charge *charge, int next_command, int open_command)
{
    union bpf_attr next = {.start_id = 0};
    while (bpf(next_command, &next) == 0) {
        /* The ids to start from, of a program and of a map are members of one union. */
        union bpf_attr open = {.prog_id = next.next_id};
        int fd = bpf(open_command, &open);
        next.start_id = next.next_id;
        if (fd < 0)
            continue;
        if (open_command == BPF_MAP_GET_FD_BY_ID) {
            charge->map_bytes += fdinfo(fd, "memlock:");
            charge->maps++;
        } else {
            charge->program_bytes += fdinfo(fd, "memlock:");
            charge->programs++;
            /* Since Linux 5.16. */
            charge->verified_instructions += fdinfo(fd, "verified_insns:");
        }
        close(fd);
    }
}

static struct charge charge_now(void)
{
    struct charge charge = {0};
    add_all(&charge, BPF_MAP_GET_NEXT_ID, BPF_MAP_GET_FD_BY_ID);
    add_all(&charge, BPF_PROG_GET_NEXT_ID, BPF_PROG_GET_FD_BY_ID);
    return charge;
}

static pid_t start(char *seconds)
{
    char *words[] = {"/windlass", "quickstart", "--json", "--seconds", seconds, "--dir", "/data", NULL};
    pid_t child = fork();
    if (child == 0) {
        int out = open("/tmp/summary.json", O_WRONLY | O_CREAT | O_TRUNC, 0644);
        int log = open("/tmp/log", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644);
        dup2(out, STDOUT_FILENO);
        dup2(log, STDERR_FILENO);
        execv(words[0], words);
        perror(words[0]);
        _exit(127);
    }
    return child;
}

static void print_file(const char *name, const char *path)
{
    static char line[MAX_LINE];
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        printf("@ %s %s\n", name, line);
    }
    if (file)
        fclose(file);
}

int main(int count, char **arguments)
{
    struct charge most = {0};
    struct utsname kernel;
    struct timespec pause = {.tv_nsec = POLL_MS * 1000000L};
    int status = 0;
    pid_t ended;

    set_up();
    uname(&kernel);
    printf("\n@ kernel %s\n", kernel.release);
    fflush(stdout);
    if (count > 2)
        setenv("WINDLASS_BPF_TURNS", arguments[2], 1);
    pid_t child = start(count > 1 ? arguments[1] : "10");
    /* As the first process this one inherits orphans too. */
    while ((ended = waitpid(-1, &status, WNOHANG)) != child && !(ended < 0 && errno == ECHILD)) {
        struct charge now = charge_now();
        if (now.programs >= most.programs && now.map_bytes >= most.map_bytes)
            most = now;
        nanosleep(&pause, NULL);
    }
    printf("@ maps %u %llu\n", most.maps, most.map_bytes);
    printf("@ program %u %llu %llu\n", most.programs, most.program_bytes, most.verified_instructions);
    print_file("log", "/tmp/log");
    print_file("json", "/tmp/summary.json");
    print_file("stack", "/data/profile.folded");
    printf("@ status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    fflush(stdout);
    /* What is queued goes out before the machine does. */
    tcdrain(STDOUT_FILENO);
    reboot(RB_POWER_OFF);
    /* Without a way to power off, a panic ends the machine: it was started to reboot then, and not to come back. */
    return 0;
}
