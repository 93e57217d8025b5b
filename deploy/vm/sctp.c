/* SCTP for test-vm.sh, in C since no interpreter of the machines speaks it.
 *
 * `sctp serve PORT NAME` answers every connection with NAME and the client's address, for ever;
 * `sctp ask ADDRESS PORT` prints such an answer. One that does not come within ten seconds is a failure. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int open_socket(void) {
    int sock = socket(AF_INET, SOCK_STREAM, IPPROTO_SCTP);
    if (sock < 0) fail("socket");
    return sock;
}

static void serve(const char *port, const char *name) {
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    int listener = open_socket();
    if (bind(listener, (struct sockaddr *)&own, sizeof own)) fail("bind");
    if (listen(listener, 16)) fail("listen");
    for (;;) {
        struct sockaddr_in peer;
        socklen_t length = sizeof peer;
        char answer[256], address[INET_ADDRSTRLEN];
        int sock = accept(listener, (struct sockaddr *)&peer, &length);
        if (sock < 0) fail("accept");
        inet_ntop(AF_INET, &peer.sin_addr, address, sizeof address);
        snprintf(answer, sizeof answer, "%s to %s\n", name, address);
        if (send(sock, answer, strlen(answer), MSG_NOSIGNAL) < 0) perror("send");
        close(sock);
    }
}

static void ask(const char *address, const char *port) {
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    struct timeval patience = {.tv_sec = 10};
    char answer[256];
    int sock = open_socket();
    if (inet_pton(AF_INET, address, &peer.sin_addr) != 1) fail("inet_pton");
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(sock, (struct sockaddr *)&peer, sizeof peer)) fail("connect");
    ssize_t length = recv(sock, answer, sizeof answer, 0);
    if (length < 0) fail("recv");
    fwrite(answer, 1, length, stdout);
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "serve") == 0) {
        serve(argv[2], argv[3]);
    } else if (argc == 4 && strcmp(argv[1], "ask") == 0) {
        ask(argv[2], argv[3]);
    } else {
        fprintf(stderr, "usage: sctp serve PORT NAME | sctp ask ADDRESS PORT\n");
        return 2;
    }
    return 0;
}
